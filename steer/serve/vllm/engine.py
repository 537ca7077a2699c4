"""The engine of `steer serve --engine vllm`: vLLM's scheduler, paged cache and compiled model in this process.

`VllmEngine` is the `BatchingEngine` with another batcher. Sliders are looked up before every step, and every text draws
its tokens from its own stream, so replies are those of the transformers engine.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import math
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from steer.checkpoint.dtypes import announce, computing_in
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import SteerError, UnsupportedError
from steer.files import one_line
from steer.model.steering.low_rank import ForwardContext
from steer.serve.batching import BatchingEngine
from steer.serve.packed import READ, SHARE, Part, cache_bytes
from steer.serve.vllm.keys import edit_key, timed
from steer.serve.vllm.plugin import register
from steer.serve.vllm.taps import TapSteering, steering

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

_BLOCK = 32
"""Tokens per block of the cache on a CPU, whose kernels want multiples of 32."""
_OFF_BY = 0.02
"""Largest distance of a residual stream from the sum of all vectors written to it, as a share of its norm. Rounding to
bf16 gives 0.005 on the default merge; a tap at another tensor gives 0.1 or more."""


class VllmEngine(BatchingEngine):
    """An `Engine` on vLLM. `model` is described (`steer.model.steered.describe`): vLLM alone holds weights.

    Prompts with a common beginning share its cache where the same sliders act (`edit_key`). A text begins only when
    the cache has room for its whole length, so none is preempted.
    """

    def __init__(
        self,
        model: SteeredModel,
        place: str,
        max_running: int = 16,
        max_waiting: int = 64,
        context: int | None = None,
        **options: Any,
    ) -> None:
        """Load the weights into vLLM, compile, and check that edits reach the compiled model.

        `place`: the checkpoint's directory. `options`: of vLLM's `EngineArgs`. The others, and errors: as
        `BatchingEngine`; UnsupportedError for a model on which edits do not arrive.
        """
        self._place, self._options, self._batchers = place, options, 0
        self._errors: dict[str, Exception] = {}
        """Text -> why its edit could not be prepared for the step."""
        super().__init__(model, max_running, max_waiting, context)

    def _batcher_maker(self, places: int, context: int) -> Callable[[], Any]:
        core = _core(self.model, self._place, places, context, self._options)
        self.model.steering = steering()

        def make() -> VllmBatcher:
            self._batchers += 1
            if self._batchers > 1:  # its process group and its compiled model exist once in a process
                core.shutdown()
                raise SteerError("vLLM cannot be started again in this process; start steer serve again")
            return VllmBatcher(core, places, context, self._edit_before_step)

        return make

    def _edit_before_step(self, id: str) -> Edit | None:
        """The edit of a text for the next step. It is asked for once, since the cache is keyed by it."""
        text = self._running[id]
        self._errors.pop(id, None)
        try:
            edit = text.job.edit()
            if edit is not None and edit is not text.edit:
                self.model.steering.work_out(edit)
        except Exception as e:
            self._errors[id] = e
            return None
        text.edit = edit
        return edit

    def _edit_of(self, text: Any) -> Edit | None:
        if text.id in self._errors:
            raise self._errors.pop(text.id)
        return text.edit


def _core(model: SteeredModel, place: str, places: int, context: int, options: dict[str, Any]) -> Any:
    """vLLM's scheduler and executor, with the weights loaded and compiled, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # sliders are looked up in this process before every step
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    register()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    chosen = computing_in(place)
    announce(chosen, model.name)
    given: dict[str, Any] = {
        "model": place,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": "auto" if chosen.dtype is None else str(chosen.dtype).removeprefix("torch."),
        "max_model_len": context,
        "max_num_seqs": places,
        "max_num_batched_tokens": max(READ, places),
        "async_scheduling": False,
        "disable_log_stats": True,
    }
    if not torch.cuda.is_available():
        given |= {"block_size": _BLOCK, "kv_cache_memory_bytes": _memory(model, chosen.dtype, places, context)}
    try:
        config = EngineArgs(**given | options).create_engine_config()
        return EngineCore(config, Executor.get_class(config), log_stats=False)
    except (ValueError, RuntimeError, TypeError) as e:
        raise SteerError(f"{model.name}: vLLM cannot load it: {one_line(e)}") from e


def _memory(model: SteeredModel, dtype: torch.dtype | None, places: int, context: int) -> int:
    """Bytes for the cache on a CPU: room for `places` texts of `context` tokens, at most SHARE of what is free."""
    block = cache_bytes(model.hf.config, dtype or model.hf.dtype) * _BLOCK
    wanted = block * (places * math.ceil(context / _BLOCK) + 1)  # vLLM keeps one block for itself
    return min(wanted, int(psutil.virtual_memory().available * SHARE))


class VllmBatcher:
    """Packs texts into steps of vLLM's model runner, as `packed.Batcher` does for transformers."""

    def __init__(self, core: Any, places: int, context: int, edit_of: Callable[[str], Edit | None]) -> None:
        """`edit_of`: the edit of a text, by its id, for the step that is prepared."""
        self._core: Any = core
        self._edit_of = edit_of
        self._runner: Any = core.model_executor.driver_worker.worker.model_runner
        # The order of the texts in a step is known once the runner has updated its states; it updates them then.
        self._update, self._state = self._runner._update_states, (None, None)
        self._runner._update_states = self._updated
        self._runner._sample = self._sampled
        cache = core.vllm_config.cache_config
        self._block = cache.block_size
        self.capacity: int = cache.num_gpu_blocks - 1
        """Total number of blocks."""
        self.context = min(context, self.capacity * self._block // min(2, places))
        """Most tokens of one text, so many that a second one of this length fits beside it."""
        self._lock = threading.Lock()
        self._new: dict[str, tuple[list[int], int, list[int]]] = {}
        self._dropped: list[str] = []
        self._requests: dict[str, tuple[Any, Edit | None]] = {}
        self._keys: WeakKeyDictionary[Edit, str] = WeakKeyDictionary()
        self._tokens: dict[str, int] = {}

    def pages(self, tokens: int) -> int:
        """Return the most blocks, of `capacity`, that a text of `tokens` tokens takes."""
        return math.ceil(tokens / self._block)

    def add(self, id: str, prompt: Sequence[int], new: int, ends: Sequence[int]) -> None:
        """As `packed.Batcher.add`; any thread may call it."""
        with self._lock:
            self._new[id] = list(prompt), new, list(ends)

    def drop(self, id: str) -> None:
        """Remove a text from the following steps; any thread may call it."""
        with self._lock:
            if self._new.pop(id, None) is None:
                self._dropped.append(id)

    def next(self) -> list[Part]:
        """Prepare the next step and return its texts; an empty list if there is nothing to do."""
        with self._lock:
            new, self._new, dropped, self._dropped = self._new, {}, self._dropped, []
        self._runner.execute_model_state = None  # of a step whose tokens could not be drawn
        self._core.abort_requests(dropped)
        self._requests = {id: r for id, r in self._requests.items() if id not in dropped and not r[0].is_finished()}
        for id, (request, before) in self._requests.items():
            edit = self._edit_of(id)
            if edit is not before:
                self._rekey(request)
                self._requests[id] = request, edit
        for id, (prompt, most, ends) in new.items():
            edit = self._edit_of(id)
            self._requests[id] = self._begin(id, prompt, most, ends, self._key(edit)), edit
        scheduler = self._core.scheduler
        if not scheduler.has_requests():
            return []
        self._step = scheduler.schedule()
        if not self._step.total_num_scheduled_tokens:  # it only tells the runner which texts have ended
            scheduler.update_from_output(self._step, self._core.model_executor.execute_model(self._step))
            return []
        self._state = self._step, self._update(self._step)
        batch, parts, positions, start = self._runner.input_batch, [], [], 0
        for id, read in zip(batch.req_ids, batch.num_computed_tokens_cpu, strict=False):
            count = self._step.num_scheduled_tokens[id]
            writes = read + count >= self._runner.requests[id].num_tokens
            parts.append(Part(id, slice(start, start := start + count), bool(writes)))
            positions.append(torch.arange(int(read), int(read) + count))
        self.positions = torch.cat(positions)[None]
        self._writers = [i for i, part in enumerate(parts) if part.writes]
        self._ids = [part.id for part in parts]
        return parts

    def forward(self) -> Float[Tensor, "writes vocab"]:
        """Run the step and return the logits of the texts that write."""
        with steering().step(self._step.total_num_scheduled_tokens):
            self._core.model_executor.execute_model(self._step)
        logits = self._runner.execute_model_state.logits
        return logits if len(self._writers) == len(self._ids) else logits[self._writers]

    def take(self, tokens: Sequence[int]) -> None:
        """End the step: append the chosen tokens to the texts that write."""
        self._tokens = {self._ids[i]: token for i, token in zip(self._writers, tokens, strict=True)}
        output = self._core.model_executor.sample_tokens(None)
        self._core.scheduler.update_from_output(self._step, output)

    @torch.inference_mode()
    def check(self) -> None:
        """Write a token under an edit at every block and every writer, and check that each arrived at its place.

        The residual stream after each block is the sum of the writers' outputs and of the shifts added after earlier
        blocks, and the logits are the model's own of the last stream. An operation that did not run, ran on another
        tensor or in the wrong place breaks this, and so do hooks that were not traced.
        Errors: UnsupportedError that says where.
        """
        steering_: TapSteering = steering()
        anatomy = steering_.anatomy
        model: Any = steering_.model
        stream = torch.Generator().manual_seed(0)

        def direction(site: int) -> Direction:
            return Direction(f"check {site}", site, torch.randn(anatomy.width, generator=stream))

        edit = Edit(ablate=[direction(0)], add=[(direction(site), 1.0) for site in range(anatomy.blocks)])
        self.add("check", [101 * n % model.config.vocab_size for n in range(2, 7)], 1, ())
        before, self._edit_of = self._edit_of, lambda id: edit
        try:
            parts = self.next()
        finally:
            self._edit_of = before
        with steering_.alone([edit]), steering_.passing(ForwardContext(packed=True)), steering_.recording() as taps:
            logits = self.forward().float()
        self.take([0])
        self.next()
        if len(parts) != 1 or not parts[0].writes:
            raise _unsupported("a short prompt takes several steps")
        writers = {w.module: w.block for w in anatomy.live_writers}
        total = sum((taps[w][1].float() for w, block in writers.items() if block is None and w in taps), torch.zeros(1))
        for site in range(anatomy.blocks):
            path = anatomy.block_module(site)
            if path not in taps or not all(w in taps for w, block in writers.items() if block == site):
                raise _unsupported(f"an operation in block {site} does not run; its graph was compiled without it")
            total = total + sum(taps[w][1].float() for w, block in writers.items() if block == site)
            given, edited = (h.float() for h in taps[path])
            if float((given - total).norm()) > _OFF_BY * float(total.norm()):
                raise _unsupported(
                    f"the residual stream after block {site} is not the sum of all vectors written to it"
                )
            total = edited
        last = model.get_submodule(anatomy.final_norm_module)(total[-1:].to(taps[path][1].dtype))
        expected = model.compute_logits(last).float()
        if float((logits - expected).norm()) > _OFF_BY * float(expected.norm()):
            raise _unsupported("the logits are not those of the last residual stream")

    def close(self) -> None:
        """Free the cache and the model. Further calls do nothing."""
        if self._core is not None:
            self._core.shutdown()
            self._core = None

    def _begin(self, id: str, prompt: list[int], new: int, ends: list[int], salt: str | None) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, stop_token_ids=ends, detokenize=False)
        request = Request(id, prompt, params, None, cache_salt=salt, block_hasher=self._core.request_block_hasher)
        self._core.add_request(request)
        return request

    def _key(self, edit: Edit | None) -> str | None:
        if edit is None:
            return None
        if timed(edit):
            return secrets.token_hex()  # what a token's cache holds depends on where the prompt ended
        if edit not in self._keys:
            self._keys[edit] = edit_key(edit)
        return self._keys[edit]

    def _rekey(self, request: Any) -> None:
        """After a slider moved: from the block on that is being filled, no other text may use the cache of this one."""
        if request._block_hasher is None:
            return
        salt, plain = secrets.token_bytes(), self._core.request_block_hasher
        del request.block_hashes[request.num_computed_tokens // self._core.scheduler.hash_block_size :]
        request._block_hasher = lambda r: [hashlib.sha256(salt + h).digest() for h in plain(r)]
        request.update_block_hashes()

    def _updated(self, step: Any) -> Any:
        """In place of the runner's `_update_states`, which `next` has called already for its steps."""
        return self._state[1] if step is self._state[0] else self._update(step)

    def _sampled(self, logits: Tensor, spec_decode_metadata: Any) -> Any:
        """In place of the runner's `_sample`: the tokens that `take` was given."""
        from vllm.v1.outputs import SamplerOutput

        tokens = [[self._tokens.get(id, 0)] for id in self._runner.input_batch.req_ids]
        return SamplerOutput(torch.tensor(tokens, dtype=torch.int32, device=logits.device), None)


def _unsupported(found: str) -> UnsupportedError:
    return UnsupportedError(
        f"vLLM: expected edits to reach its compiled model, found that {found}; use --engine transformers"
    )

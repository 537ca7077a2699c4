"""What is used of transformers' continuous batching; nothing else knows its names.

transformers schedules, keeps the KV cache in pages and packs the tokens of a step, several texts behind each other.
Running the model on them and choosing tokens is left to whoever asks for the steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from steer.errors import SteerError, UnsupportedError
from steer.live.serve.packed_attention import NAME, packing
from steer.weights.anatomy import Anatomy

SHARE = 0.25
"""Of the free memory, at most this much is for pages on a CPU."""
PAGE = 64
"""Tokens a page on a CPU."""
READ = 256
"""Tokens a step on a CPU: longer prompts are read in pieces, between which the others go on writing."""
_WRITTEN_FOR = "5.19"
_OFF_BY = 0.25
"""How far packed logits may be from plain ones, as a share of what is between those of two texts. On the default merge
rounding to bf16 gives 0.06, texts that see each other 0.4."""


@dataclass(frozen=True)
class Part:
    """What one text brings to a step."""

    id: str
    tokens: slice
    """Its place among the packed tokens."""
    writes: bool
    """Whether its next token is to be chosen; else more of its prompt is to be read."""


def text_id(request: object, number: int) -> str:
    """What a text is known by: its request, and its place among all texts."""
    return f"{id(request)} {number}"


class Batcher:
    """Texts in, steps out: `next`, `forward`, `take`, over and over, in one thread. `add` and `drop` from any.

    Prefixes are not shared: what is cached of a prompt depends on the sliders it was read under.
    """

    def __init__(self, hf: Any, anatomy: Anatomy, places: int, context: int) -> None:
        """For `places` texts at once, of `context` tokens each where memory allows.

        Errors: SteerError without memory for a page, UnsupportedError for a transformers that works otherwise.
        """
        self._hf, self._own_attention = hf, hf.config._attn_implementation
        # On a GPU transformers' attention is faster, where it does all that the architecture asks of it.
        self._ours = hf.device.type == "cpu" or anatomy.layout.own_scores
        try:
            with _known_names(), _random_state():
                self._manager: Any = self._made(places, context)
                self._processor: Any = self._manager.batch_processor
                self._scheduler: Any = self._processor.scheduler
                self._scheduler.read = self._scheduler.most = self._processor.max_batch_tokens
                self._allocators: list[Any] = list(self._processor.cache.cache_allocators.values())
                self.capacity: int = self._processor.cache.num_sectors
                """The pages there are."""
                self.context = self._longest(context, min(2, places))
                """Tokens that one text may have: so many that there is room for another beside it."""
        except BaseException:
            self._hf.set_attn_implementation(self._own_attention)
            raise

    def _made(self, places: int, context: int) -> Any:
        from steer.live.serve.turns import FAIR  # here, where names that another transformers lacks are told of

        config = transformers.ContinuousBatchingConfig(
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,  # a replayed graph calls no hook
            auto_switch_to_flash=False,  # it would be fetched
            safety_margin=0.0,  # whoever adds texts sees to it that they fit
            max_requests_per_batch=places,
            scheduler_type=FAIR,
            **(_pages(self._hf, places, context) if self._hf.device.type == "cpu" else {}),
        )
        if self._ours:
            self._hf.set_attn_implementation("paged|eager")  # which every architecture has; it never runs
        elif not self._own_attention.startswith(("flash", "kernels-community")):
            self._hf.set_attn_implementation("sdpa")
        manager = self._hf.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), config)
        if self._ours:
            # After the manager was made, which takes no attention but those it knows; before it makes masks for them.
            self._hf.set_attn_implementation(NAME)
        try:
            manager.warmup()
        except (MemoryError, ValueError) as e:
            raise SteerError(f"no room for the KV cache: {e}; free memory, or serve a smaller context") from e
        return manager

    def _longest(self, context: int, texts: int) -> int:
        low, high = 0, context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if texts * self.need(middle) <= self.capacity else (low, middle - 1)
        return low

    def need(self, tokens: int) -> int:
        """How much of `capacity` a text of that length takes, at most."""
        return sum(math.ceil(a.needs_new_blocks("", 0, tokens) / a.blocks_per_sector) for a in self._allocators)

    def add(self, id: str, prompt: Sequence[int], new: int, ends: Sequence[int]) -> None:
        """Have a text in the steps to come, until it has `new` tokens or one of `ends`.

        Together the texts may need `capacity`: one that was begun is then never put off and read anew.
        """
        with _known_names():
            taken = self._manager.add_request(
                list(prompt), request_id=id, max_new_tokens=new, eos_token_id=list(ends) or -1
            )
        if taken is None:
            raise SteerError("transformers' continuous batching takes no more texts")

    def drop(self, id: str) -> None:
        """Have it in no more steps."""
        self._manager.cancel_request(id)

    def next(self) -> list[Part]:
        """The texts of the next step, empty when there is nothing to do."""
        with _known_names():
            if not self._processor.prepare_next_batch():
                return []
            io = self._processor.inputs_and_outputs
            parts, start = [], 0
            for one in io.requests_in_batch:
                tokens = slice(start, start := start + one.query_length)
                parts.append(Part(one.state.request_id, tokens, one.has_new_token))
            self._inputs: dict[str, Any] = dict(io.get_model_kwargs(use_padding=False))
            self.positions: Int[Tensor, "1 tokens"] = self._inputs["position_ids"]
            """Of the step's tokens, each in its own text."""
            self._writes = sum(p.writes for p in parts)
            self._since = time.perf_counter()
            self._inputs["logits_to_keep"] = self._inputs["logits_indices"][: self._writes]
            if self._ours:
                self._inputs |= packing(
                    self._inputs, getattr(self._hf.config.get_text_config(), "sliding_window", None)
                )
            return parts

    def forward(self) -> Float[Tensor, "writes vocab"]:
        """The model's logits for the texts of the step that write."""
        # Where nobody writes yet, every token's logits would come back.
        inputs = self._inputs if self._writes else self._inputs | {"logits_to_keep": 1}
        return self._hf(**inputs).logits[0][: self._writes]

    def take(self, tokens: Sequence[int]) -> None:
        """The tokens that were chosen; the step is over."""
        self._scheduler.took(time.perf_counter() - self._since)
        with _known_names():
            io = self._processor.inputs_and_outputs
            io.output_ids[0, : len(tokens)] = torch.tensor(tokens, dtype=io.output_ids.dtype)
            self._processor.update_batch()
            while self._manager.get_result(timeout=0) is not None:
                pass  # whole replies, which it would keep for someone to fetch

    @torch.inference_mode()
    def check(self) -> None:
        """Write two tokens to each of two short texts. Errors: UnsupportedError where logits are not those of each
        text alone."""
        vocab = self._hf.config.get_text_config().vocab_size
        ids = [101 * n % vocab for n in range(2, 11)]
        texts = {"check 1": (ids[:4], ids[7]), "check 2": (ids[4:7], ids[8])}
        alone = {id: [self._alone(text), self._alone([*text, more])] for id, (text, more) in texts.items()}
        apart = sum(float((a - b).norm()) for a, b in zip(*alone.values(), strict=True))
        for id, (text, _) in texts.items():
            self.add(id, text, 2, ())
        off = 0.0
        while parts := self.next():
            for part, logits in zip(parts, self.forward().float(), strict=True):
                off += float((logits - alone[part.id].pop(0)).norm())
            self.take([texts[p.id][1] for p in parts])
        if off > _OFF_BY * 2 * apart:
            raise _unsupported("texts that are packed together get other logits than alone")

    def _alone(self, text: Sequence[int]) -> Float[Tensor, " vocab"]:
        ids = torch.tensor([text], device=self._hf.device)
        return self._hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()

    def close(self) -> None:
        """Let go of the pages; the model has its own attention again. Once is enough."""
        if self._manager is None:
            return
        self._manager.destroy()
        self._hf.set_attn_implementation(self._own_attention)
        self._manager = self._processor = None
        self._allocators, self._inputs = [], {}


def _pages(hf: Any, places: int, context: int) -> dict[str, Any]:
    """How many pages a CPU is to have: for every place its context, if that is not too much of the free memory."""
    config = hf.config.get_text_config()
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    a_page = 2 * groups * d * hf.dtype.itemsize * config.num_hidden_layers * PAGE
    wanted = places * math.ceil(context / PAGE)
    fits = int(psutil.virtual_memory().available * SHARE) // a_page
    return {
        "page_size": PAGE,
        "num_blocks": max(1, min(wanted, fits)),
        "max_batch_tokens": max(READ, places),
        "max_memory_percent": 0.95,
    }


@contextmanager
def _known_names() -> Iterator[None]:
    """What a transformers raises that has other names, as an error that says so."""
    try:
        yield
    except (AttributeError, TypeError, KeyError, ImportError) as e:
        raise _unsupported(f"{type(e).__name__}: {e}") from e


def _unsupported(found: str) -> UnsupportedError:
    return UnsupportedError(
        f"transformers {transformers.__version__}: expected the continuous batching of {_WRITTEN_FOR}, "
        f"found another ({found}); install transformers {_WRITTEN_FOR}"
    )


@contextmanager
def _random_state() -> Iterator[None]:
    """transformers seeds torch's global generators for its own sampling, which is not used."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield

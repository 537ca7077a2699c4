"""The running model: load it, move its sliders, let it speak, read its residual stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import CheckpointError, UsageError
from steer.live import attention
from steer.live.batch import generate
from steer.live.compiled import CompiledStep
from steer.live.decode import decode
from steer.live.detokenise import Detokeniser
from steer.live.hooks import LensHooks, ModuleHook, ReplyStart, Steers, lens_hooks, plain_hooks
from steer.live.loading import files_of, read_model
from steer.live.memory import Memory
from steer.live.receipts import Tally
from steer.live.record import Recording, reading
from steer.live.sliders import Sliders, as_edit, as_slider
from steer.live.steering import Steering
from steer.live.tokens import check_length, context_length, end_token_ids, ids_of
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.lists import as_list
from steer.values.sampler import CHAT, Sampler
from steer.values.slider import Slider
from steer.weights.anatomy import Anatomy
from steer.weights.fetch import resolve
from steer.weights.sketch import Sketch, sketch_files

ROWS = 192
"""Replies written together at most. On two cores with AVX2 a token of a 135M Llama costs 0.75 of what it does among 96:
products of fewer rows wait for the weights."""
Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


def load(
    model: str | Path, *, dtype: Any = None, device_map: Any = None, four_bit: bool = False, **kwargs: Any
) -> SteeredModel:
    """Load a checkpoint (directory, hub id, or the default model's name) and make it steerable.

    `device_map`, `quantization_config` and the rest go to transformers as they are. Without a `device_map` the model
    goes to the GPU where there is one. `dtype` is what it computes in: a torch dtype or its name, "stored", or "auto",
    the default: the stored dtype where products in it are fast, else float32 if that fits into memory. The choice is
    logged. $STEER_DTYPE takes the place of a `dtype` that is left out. `four_bit` quantises the weights as they are
    loaded, to bitsandbytes' NF4.
    Errors: CheckpointError when there is no such model, or no room for it, UnsupportedError for an unknown
    architecture, UsageError for 4 bits without bitsandbytes, a GPU that is not there and an unknown dtype.
    """
    place = resolve(model)
    hf, tokenizer = read_model(place, str(model), dtype, device_map, four_bit, kwargs)
    return SteeredModel(hf, tokenizer, name=str(model), files=files_of(place))


class SteeredModel:
    """A transformers model with sliders. `hf` stays an ordinary model; neutral sliders leave it no hook."""

    def __init__(
        self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model", files: Path | None = None
    ) -> None:
        self.hf: Any = hf.eval()
        self.tokenizer: Any = tokenizer
        self.name = name
        self.anatomy = Anatomy.of(hf.config.to_dict(), name)
        if self.anatomy.layout.own_scores and hf.config._attn_implementation == "sdpa":
            hf.set_attn_implementation(attention.NAME)  # else the softcap would be left out
        self.steering = Steering(hf, self.anatomy)
        self.sliders = Sliders(self)
        self.compiled: CompiledStep | None = None
        """What single texts are decoded with, after `compile`."""
        self.end_token_ids = end_token_ids(hf.config, hf.generation_config, tokenizer)
        """Tokens that end a reply: of the generation config, the config, the tokenizer, and the one that the chat
        template writes after a reply."""
        self.context = context_length(hf.config)
        """Tokens that the model reads at most, a prompt and its reply together."""
        self._files = files

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embedding = self.hf.get_input_embeddings()
        if embedding.weight.device.type != "meta":
            return embedding.weight.device
        return torch.device(embedding._hf_hook.execution_device)  # offloaded: where accelerate brings it

    def sketch(self) -> Sketch:
        """A small sample of the weights, by which directions know their checkpoint. Of its files where it has any: what
        runs may be quantised, offloaded, or have its experts in one tensor."""
        return self._sketch

    @cached_property
    def _sketch(self) -> Sketch:
        if self._files is not None:
            return sketch_files(self._files)
        tensors = dict(self.hf.named_parameters())
        return Sketch.of(list(tensors), lambda name: tensors[name].detach(), self.hf.config.to_dict())

    # Talking

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to the point where the reply begins. One BOS at most.

        Errors: CheckpointError without a chat template, UsageError for a chat that the template refuses;
        those of `encode`.
        """
        if not self.tokenizer.chat_template:
            raise CheckpointError(
                f"{self.name}: expected a chat template in the tokenizer, found none; "
                "copy chat_template.jinja from the tune it was made of"
            )
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as e:
            raise UsageError(f"{self.name}: its chat template refuses this chat: {e}") from e
        return self.encode(text)

    def encode(self, text: str, *, frame: bool = False) -> list[int]:
        """Token ids of a text as it is; with `frame` between the special tokens that the tokenizer puts around one.

        Errors: UsageError for text that is no Unicode, CheckpointError for a token that the embedding has no row for.
        """
        return ids_of(self.tokenizer, [text], self.vocabulary, self.name, frame=frame)[0]

    def check_finite(self, numbers: Tensor) -> None:
        """Raise unless logits or residual streams are finite in every row.

        Errors: CheckpointError that names the dtype: float16 ends at 65504, and some models' activations do not.
        """
        # The largest of each row is NaN where any is.
        if not bool(numbers.amax(-1).isfinite().all()):
            raise self.overflow(any(self.steering.rows))

    def overflow(self, steered: bool = False) -> CheckpointError:
        """The error for logits or residual streams that are not finite, `steered` or not."""
        dtype = str(self.hf.dtype).removeprefix("torch.")
        under = " under these sliders" if steered else ""
        return CheckpointError(
            f"{self.name}: expected finite numbers in the forward pass{under}, found NaN or infinity in {dtype}; "
            + ("load it as float32 or bfloat16" if dtype == "float16" else "check the weights")
        )

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding. A tokenizer may know fewer tokens, or more."""
        return int(self.hf.get_input_embeddings().weight.shape[0])

    def chat(self, message: str | Sequence[Message], *, system: str | None = None, **sampling: Any) -> str:
        """The reply to a message, or to a whole chat, under the current sliders.

        Keyword arguments are fields of Sampler: `temperature`, `max_new_tokens`, `seed`, ...
        """
        return "".join(self.stream(message, system=system, **sampling))

    def stream(
        self,
        message: str | Sequence[Message],
        *,
        system: str | None = None,
        sampler: Sampler = CHAT,
        tally: Tally | None = None,
        memory: Memory | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The reply in pieces, as it is written: each token is made when its piece is asked for, so a slider
        moved between two pieces is felt by the next. `sampling` are changes of `sampler`; `tally` and `memory` as
        `decode` takes them."""
        prompt = self.prompt_ids(as_messages(message, system))
        return self.stream_ids(prompt, replace(sampler, **sampling), tally, memory)

    def stream_ids(
        self, prompt: list[int], sampler: Sampler, tally: Tally | None = None, memory: Memory | None = None
    ) -> Iterator[str]:
        """As `stream`, for a prompt that is token ids."""
        # Without the prompt: a reply by itself has no space before its first word, where the tokenizer adds one.
        text = Detokeniser(self.tokenizer, ())
        for step in decode(self, [prompt], sampler, tally=tally, memory=memory):
            if step.tokens[0] in self.end_token_ids:
                break
            yield text.add(step.tokens[0])
        if rest := text.end():
            yield rest

    def replies(
        self,
        chats: Sequence[Sequence[Message]],
        sampler: Sampler,
        edits: Sequence[Edit | None] | None = None,
        *,
        keys: Sequence[int] | None = None,
        batch: int = ROWS,
        on_tokens: Callable[[int], None] | None = None,
        sums: Float[Tensor, "sites chats d"] | None = None,
    ) -> list[list[int]]:
        """Replies to many chats, as token ids, each row under its own edit (None: untouched).

        Chats of like length are batched together, at most `batch` and as many in each. `keys` seed the rows' random
        streams: rows with one key draw the same numbers, which pairs an edited reply with the unedited one. `sums` is
        set to the residual stream after each block, summed over the tokens of each reply.
        """
        prompts = [self.prompt_ids(c) for c in chats]
        check_length(self.name, max(map(len, prompts), default=0), self.context)  # before hours of the others
        keys = list(keys) if keys is not None else list(range(len(prompts)))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: list[list[int]] = [[] for _ in prompts]
        size = math.ceil(len(order) / max(1, math.ceil(len(order) / batch)))
        for start in range(0, len(order), max(1, size)):
            rows = order[start : start + size]
            part = None if sums is None else sums.new_zeros(len(sums), len(rows), sums.shape[-1])
            # Each different edit is applied once, however many rows are under it.
            each = list(dict.fromkeys(edits[i] for i in rows)) if edits is not None else []
            which = [each.index(edits[i]) for i in rows] if edits is not None else None
            with self.steering.alone(each) if each else _as_is():
                made = generate(
                    self,
                    [prompts[i] for i in rows],
                    sampler,
                    [keys[i] for i in rows],
                    on_tokens,
                    which=which,
                    sums=part,
                )
            if sums is not None and part is not None:
                sums[:, rows] = part
            for i, reply in zip(rows, made, strict=True):
                out[i] = reply
        return out

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def compile(self, sliders: Slider | str | Iterable[Slider | str] = (), **options: Any) -> None:
        """Decode single texts through torch.compile. It is compiled here: blocks of one make once, and the head.

        Sliders move, come and go without another compilation; the first that acts inside of blocks, as an ablation
        does, costs one then unless it is among `sliders`. `options` go to torch.compile.
        Batches and prompts go through the plain model.
        """
        compiled = CompiledStep(self, **options)
        compiled.warm_up()
        for slider in (self.sliders.slider(s) if isinstance(s, str) else s for s in as_list(sliders)):
            if slider.operation == "ablate":
                with self.steered({slider: 0.5}):
                    compiled.warm_up()
        self.compiled = compiled

    def uncompile(self) -> None:
        """Decode with the plain model again."""
        self.compiled = None

    # Steering and reading

    @contextmanager
    def steered(self, sliders: Mapping[Direction | Feature | Slider | str, float]) -> Iterator[SteeredModel]:
        """Amounts for the length of a block; the sliders come back as they were, exceptions included.

            with model.steered({moral: -1.5}):
                print(model.chat("My friend lied to me."))

        A Direction or a Feature is added, `Slider(direction, "ablate")` is ablated, `Slider(feature, "clamp")` is
        clamped, a name means what it means in `model.sliders`. The amounts in `model.sliders` wait outside the block.
        """
        edit = as_edit(self, [(as_slider(self, key), amount) for key, amount in sliders.items()])
        with self.steering.applied([edit]):
            yield self

    @contextmanager
    def untouched(self) -> Iterator[SteeredModel]:
        """No sliders for the length of a block, whatever stands: finding and measuring look at the model itself. Other
        threads that would steer it, or write with it, wait until the block ends."""
        with self.steering.alone([None]):
            yield self

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[SteeredModel]:
        """An Edit as hooks: what `steer.bake` would write into the weights, without writing them."""
        with self.steering.applied([edit]):
            yield self

    @contextmanager
    def record(self, sites: Sequence[int] | None = None) -> Iterator[Recording]:
        """Keep the residual stream after these blocks (all without `sites`) of every forward pass inside."""
        recording = Recording()
        sites = range(self.anatomy.blocks) if sites is None else sites
        with reading(self.hf, self.anatomy, sites, recording.append):
            yield recording

    def hooks(self, what: Steers, reply_start: ReplyStart = None) -> list[tuple[str, ModuleHook]]:
        """(module name, forward hook) for any transformers model with this model's weights. Empty when nothing moves.

            handles = [hf.get_submodule(name).register_forward_hook(hook) for name, hook in model.hooks("noir.yaml")]

        `what`: a profile or its file, an Edit, or amounts as `steered` takes them; later moves of sliders do not reach
        hooks that were made before. They hold through `generate` and its KV cache, on one model at a time.

        Sliders that wait for the reply count tokens in the embedding: a pass of several tokens is a new text's prompt,
        a pass of one is its next token, and rows are alike, as `generate` pads them on the left. `reply_start` tells
        them otherwise: how many tokens stand before the reply in a pass over both, for all rows or one a row.
        Errors: as `steered` and `Profile.load`.
        """
        return plain_hooks(self, what, reply_start)

    def transformer_lens_hooks(self, what: Steers, bridge: Any = None, reply_start: ReplyStart = None) -> LensHooks:
        """`fwd_hooks` for a TransformerBridge booted from the same checkpoint. Empty when nothing moves.

            bridge.run_with_hooks(tokens, fwd_hooks=model.transformer_lens_hooks("noir.yaml", bridge))

        `what` and `reply_start`: as `hooks`. `bridge` is looked at, not touched.
        Errors: as `hooks`; MismatchError for a bridge of other sizes, or without these hook points.
        """
        return lens_hooks(self, what, bridge, reply_start)


def as_messages(message: str | Sequence[Message], system: str | None = None) -> list[Message]:
    """A chat from a message or a chat, with a system prompt in front where one is given."""
    chat: list[Message] = [{"role": "user", "content": message}] if isinstance(message, str) else list(message)
    return [{"role": "system", "content": system}, *chat] if system else chat


@contextmanager
def _as_is() -> Iterator[None]:
    yield

"""The running model, `SteeredModel`: load it, move its sliders, have it reply, read its residual stream.

This is what `steer.load` returns, and where the parts of `steer.model` meet: `loading.py` reads the checkpoint,
`sliders.py` holds the amounts, `steering` applies them in hooks, `decode.py` writes replies.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.checkpoint.chat_templates import chosen_template
from steer.checkpoint.fetch import resolve
from steer.core.edit import Edit
from steer.core.lists import as_list
from steer.core.sampler import CHAT, Sampler
from steer.core.slider import Slider
from steer.model.compiled import CompiledStep
from steer.model.decode import decode, generate
from steer.model.hooks import LensHooks, ModuleHook, ReplyStart, Steers, lens_hooks, plain_hooks
from steer.model.kv_cache import PrefixCache
from steer.model.loaded import LoadedModel, Message, as_messages
from steer.model.loading import files_of, read_description, read_model, release_memory
from steer.model.prefill import prefill
from steer.model.sliders import Sliders, Target
from steer.model.steering.receipts import Tally
from steer.model.tokens import check_length

ROWS = 192
"""How many replies are written together at most. On two cores with AVX2 a token of a 135M Llama costs
0.75 times as much as among 96: products of fewer rows wait for the weights."""
CACHE_BYTES, CACHE_SHARE = 512 << 20, 1 / 8
"""How large the keys and values of replies that are written together may become, beyond those of one row: so many
bytes, or for a large model this share of its weights' bytes. More is no faster: 2 GiB took 1.07 of the time of 0.5 GiB
on the default merge, in bf16 on two cores with AMX."""
_LOADING = threading.Lock()
"""Models are loaded one at a time: transformers changes torch's global state while it builds one, and another that is
built meanwhile comes out with random weights."""


def load(
    model: str | Path,
    *,
    dtype: Any = None,
    device_map: Any = None,
    four_bit: bool = False,
    chat_template: str | Path | None = None,
    name: str | None = None,
    **kwargs: Any,
) -> SteeredModel:
    """Load a checkpoint and make it steerable.

        model = steer.load("path-or-hub-id", dtype="float32")
        print(model.chat("My friend lied to me."))

    `model`: a directory, a hub id, or the default model's name.
    `dtype`: what the model computes in: a torch dtype or its name, "stored", or "auto", the default: the stored dtype
    where products in it are fast, else float32 if that fits into memory. The choice is logged. Where `dtype` is left
    out, $STEER_DTYPE takes its place.
    `device_map`, and with `kwargs` `quantization_config` and the rest, go to transformers unchanged. Without a
    `device_map` the model goes to the GPU if there is one.
    `four_bit`: quantise the weights to bitsandbytes' NF4 as they are loaded, for a model that does not fit otherwise.
    `chat_template`: a template that ships (chatml, llama3, gemma, mistral, alpaca, plain) or a file, in place of the
    checkpoint's own. Where it is left out, $STEER_CHAT_TEMPLATE takes its place.
    `name`: what messages call the model; by default `model`.
    Errors: CheckpointError when there is no such model, or no room for it, UnsupportedError for an unknown
    architecture, UsageError for 4 bits without bitsandbytes, a GPU that is not there, an unknown dtype and a template
    that cannot be read.
    """
    options = {"dtype": dtype, "device_map": device_map, "four_bit": four_bit, "more": kwargs}
    return _steered(model, chat_template, name, partial(read_model, **options))


def describe(model: str | Path, *, chat_template: str | Path | None = None, name: str | None = None) -> SteeredModel:
    """A checkpoint with its tokenizer, sliders and sizes, for an engine that holds the weights itself.

        model = describe("merged")
        engine = VllmEngine(model, "merged")

    No forward pass can be made with it. Arguments and errors: as `load`.
    """
    return _steered(model, chat_template, name, read_description)


def _steered(
    model: str | Path,
    chat_template: str | Path | None,
    name: str | None,
    read: Callable[[str, str], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
) -> SteeredModel:
    """What `read` makes of a checkpoint's place and its name for messages, with a template and sliders."""
    text = chosen_template(chat_template)  # before the weights are read
    place, name = resolve(model), name or str(model)
    with _LOADING:
        hf, tokenizer = read(place, name)
        if text is not None:
            tokenizer.chat_template = text
        return SteeredModel(hf, tokenizer, name=name, files=files_of(place))


class SteeredModel(LoadedModel):
    """A loaded checkpoint with sliders. Neutral sliders leave no hook on it.

        model = steer.load("path-or-hub-id")
        model.sliders["moralizing"] = -0.5
        print(model.chat("My friend lied to me.", temperature=0))

    `LoadedModel` has the rest: token ids, recording the residual stream, edits as hooks.
    """

    def __init__(
        self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model", files: Path | None = None
    ) -> None:
        super().__init__(hf, tokenizer, name, files)
        self.sliders = Sliders(self)

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
        memory: PrefixCache | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The reply in pieces, as it is written.

            for piece in model.stream("My friend lied to me."):
                print(piece, end="", flush=True)

        Each token is made when its piece is asked for, so a slider that is moved between two pieces acts from the next
        one on. `sampling`: fields of `sampler` to change. `tally` and `memory`: as `decode` takes them.
        """
        prompt = self.prompt(as_messages(message, system))
        return chain(
            [prompt.opening] if prompt.opening else [],
            self.stream_ids(prompt.ids, replace(sampler, **sampling), tally, memory),
        )

    def stream_ids(
        self, prompt: list[int], sampler: Sampler, tally: Tally | None = None, memory: PrefixCache | None = None
    ) -> Iterator[str]:
        """As `stream`, for a prompt given as token ids."""
        # Without the prompt, so that a tokenizer which puts a space before a first word leaves it out of the reply.
        text = self.detokeniser()
        for step in decode(self, [prompt], sampler, tally=tally, memory=memory):
            if step.tokens[0] in self.end_token_ids:
                break
            yield text.add(step.tokens[0])
            if text.ended:
                return
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
        thoughts: bool = True,
    ) -> list[list[int]]:
        """Replies to many chats, as token ids, each chat under its own edit (None: unedited).

        Without `edits` all are under the current sliders. Chats of similar length are batched together, the same number
        in each batch: at most `batch`, and as many as `CACHE_BYTES` hold at their full length, or `CACHE_SHARE` of the
        weights' bytes. `keys` seed the random streams: chats with the same key draw the same numbers, which pairs an
        edited reply with the unedited one.
        `on_tokens` is called at each step with the number of tokens made. `sums` is set to the residual stream after
        each block, summed over the tokens of each reply. `thoughts`: as `prompt_ids`.
        """
        prompts = [self.prompt_ids(c, thoughts=thoughts) for c in chats]
        longest = max(map(len, prompts), default=0)
        check_length(self.name, longest, self.context)  # before hours are spent on the others
        room = max(CACHE_BYTES, int(CACHE_SHARE * sum(p.nbytes for p in self.hf.parameters())))
        batch = min(batch, max(1, room // (self.token_bytes * (longest + sampler.max_new_tokens))))
        limit = self.anatomy.rotary_limit
        if limit is not None and limit < min(longest + sampler.max_new_tokens, self.context):
            batch = 1  # a text beyond the limit changes the rotary frequencies of the others in its batch
        keys = list(keys) if keys is not None else list(range(len(prompts)))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: list[list[int]] = [[] for _ in prompts]
        size = math.ceil(len(order) / max(1, math.ceil(len(order) / batch)))
        for start in range(0, len(order), max(1, size)):
            rows = order[start : start + size]
            if start and self.device.type == "cpu":
                release_memory(garbage=False)  # else each batch adds holes in which the next one does not fit
            part = None if sums is None else sums.new_zeros(len(sums), len(rows), sums.shape[-1])
            # Each different edit is applied once, however many rows are under it.
            distinct = list(dict.fromkeys(edits[i] for i in rows)) if edits is not None else []
            which = [distinct.index(edits[i]) for i in rows] if edits is not None else None
            with self.steering.alone(distinct) if distinct else nullcontext():
                texts, seeds = [prompts[i] for i in rows], [keys[i] for i in rows]
                made = generate(self, texts, sampler, seeds, on_tokens, which=which, sums=part)
            if sums is not None and part is not None:
                sums[:, rows] = part
            for i, reply in zip(rows, made, strict=True):
                out[i] = reply
        return out

    @cached_property
    def token_bytes(self) -> int:
        """Bytes that the cache keeps of each token, at least 1: measured on one token, so that it holds for every
        architecture."""
        layers = prefill(self, [[0]], prompts=[1]).cache.layers
        held = [t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        return max(1, sum(t.nbytes for t in held if isinstance(t, Tensor)))

    def compile(self, sliders: Slider | str | Iterable[Slider | str] = (), **options: Any) -> None:
        """Decode single texts through torch.compile from now on.

            model.compile(["moralizing:ablate"])

        The call compiles the head, and the blocks once per kind of block. Sliders can then move, come and go without
        another compilation. Only the first slider that acts inside of blocks, as an ablation does, costs one when it is
        set, unless it is among `sliders`. `options` go to torch.compile. Batches and prompts run the plain model.
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
    def steered(self, sliders: Mapping[Target, float]) -> Iterator[SteeredModel]:
        """Apply these amounts inside the block; the sliders come back as they were, exceptions included.

            with model.steered({moral: -1.5}):
                print(model.chat("My friend lied to me."))

        A Direction or a Feature is added, `Slider(direction, "ablate")` is ablated, `Slider(feature, "clamp")` is
        clamped, a name means the same as in `model.sliders`. Amounts in `model.sliders` do not act inside the block.
        """
        edit = self.sliders.edit(sliders)
        with self.steering.applied([edit]):
            yield self

    def hooks(self, what: Steers, reply_start: ReplyStart = None) -> list[tuple[str, ModuleHook]]:
        """(module name, forward hook) for any transformers model with this model's weights. Empty when nothing moves.

            handles = [hf.get_submodule(name).register_forward_hook(hook) for name, hook in model.hooks("noir.yaml")]

        `what`: a profile or its file, an Edit, or amounts as `steered` takes them. Later moves of sliders do not change
        hooks that were made before. The hooks work in `generate` with its KV cache, on one model at a time.

        Sliders that depend on the position count tokens in the embedding: a pass of several tokens is the prompt of a
        new text, a pass of one is its next token, and all rows have the same length, as `generate` pads them on the
        left. For a pass over prompt and reply together, give `reply_start`: how many tokens come before the reply, one
        number for all rows or one per row.
        Errors: as `steered` and `Profile.load`.
        """
        return plain_hooks(self.sliders, what, reply_start)

    def transformer_lens_hooks(self, what: Steers, bridge: Any = None, reply_start: ReplyStart = None) -> LensHooks:
        """`fwd_hooks` for a TransformerBridge booted from the same checkpoint. Empty when nothing moves.

            bridge.run_with_hooks(tokens, fwd_hooks=model.transformer_lens_hooks("noir.yaml", bridge))

        `what` and `reply_start`: as `hooks`. `bridge` is checked, not changed.
        Errors: as `hooks`; MismatchError for a bridge of other sizes, or without these hook points.
        """
        return lens_hooks(self.sliders, what, bridge, reply_start)

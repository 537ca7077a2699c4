"""A checkpoint in memory: the transformers model, its tokenizer, its anatomy and the hooks that steer it.

`LoadedModel` is the base of `SteeredModel` (`steered.py`). Code that only reads a model or runs it, such as the decode
loops, finding and measuring, takes a `LoadedModel`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.library import Library
from steer.checkpoint.sketch import Sketch, sketch_files
from steer.core.edit import Edit
from steer.core.stops import begun
from steer.core.thoughts import ThoughtSplitter
from steer.errors import CheckpointError
from steer.model import attention
from steer.model.chat_template import THINKING, ChatTemplate, marks_of
from steer.model.record import Recording, reading
from steer.model.steering.steering import Steering
from steer.model.tokens import Detokeniser, common_length, context_length, end_token_ids, ids_of

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


WITHOUT_THOUGHTS: Mapping[str, Any] = {THINKING[0]: False}
"""Options of a chat template that ask for a reply without thoughts."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatPrompt:
    """A chat as the model reads it."""

    ids: list[int]
    begun: int = 0
    """How many ids at its end are the beginning of the reply."""
    opening: str = ""
    """As in `RenderedChat`: what `ThoughtSplitter` takes as the beginning of the reply."""
    notes: tuple[str, ...] = ()
    """What was changed so that the chat template takes the chat."""


class LoadedModel:
    """A checkpoint in memory. `hf` stays an ordinary transformers model.

    It has what forward passes, decoding and reading need; `SteeredModel` adds sliders and replies.
    """

    def __init__(
        self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model", files: Path | None = None
    ) -> None:
        self.hf: Any = hf.eval()
        self.tokenizer: Any = tokenizer
        self.name = name
        self.anatomy = Anatomy.of(hf.config.to_dict(), name)
        if self.anatomy.layout.softcap_or_sinks and hf.config._attn_implementation == "sdpa":
            hf.set_attn_implementation(attention.NAME)  # else the softcap would be left out
        self.steering = Steering(hf, self.anatomy)
        self.compiled: Any = None
        """The `CompiledStep` that single texts are decoded with, after `SteeredModel.compile`; else None."""
        self.template = ChatTemplate(tokenizer, name)
        self.template_options: dict[str, Any] = {}
        """Variables of the chat template that every chat is rendered with, such as `WITHOUT_THOUGHTS`."""
        self._noted: set[str] = set()
        if foreign := attention.drop_foreign_windows(hf.config.get_text_config()):
            self.warn_once("windows", f"config.json names {foreign}, which this architecture does not read; ignored")
        self.end_text: str | None
        """Text that ends a reply and is no part of it; None where a token does."""
        self.end_token_ids: frozenset[int]
        """Tokens that end a reply: those of the generation config, the config and the tokenizer, and the one that the
        chat template writes after a reply."""
        self._find_ends()
        self.context = context_length(hf.config, tokenizer)
        """How many tokens the model reads at most, a prompt and its reply together."""
        self._files = files
        self.library: Callable[[], Library] = partial(Library, self)
        """Returns what names of sliders mean on it; an engine whose sliders are others replaces it."""

    def use_template(self, template: str) -> None:
        """Read chats with another template from now on."""
        self.tokenizer.chat_template = template
        self._find_ends()

    def _find_ends(self) -> None:
        end = self.template.turn_end()
        self.end_text = end.text
        self.end_token_ids = end_token_ids(self.hf.config, self.hf.generation_config, self.tokenizer, end.token)
        if end.text is not None:
            self.warn_once(
                "end of turn",
                f"its tokenizer has no token {end.text}, with which the chat template ends a turn; replies end where "
                "the model writes it as text",
            )

    @property
    def device(self) -> torch.device:
        """The device that token ids have to be on."""
        embedding = self.hf.get_input_embeddings()
        if embedding.weight.device.type != "meta":
            return embedding.weight.device
        return torch.device(embedding._hf_hook.execution_device)  # offloaded: accelerate moves it there

    def sketch(self) -> Sketch:
        """A small sample of the weights, by which a direction recognises its checkpoint.

        It is taken from the checkpoint's files if there are any: the weights in memory may be quantised, offloaded, or
        have all experts in one tensor.
        """
        return self._sketch

    @cached_property
    def _sketch(self) -> Sketch:
        if self._files is not None:
            return sketch_files(self._files)
        tensors = dict(self.hf.named_parameters())
        return Sketch.of(list(tensors), lambda name: tensors[name].detach(), self.hf.config.to_dict())

    def prompt(
        self, messages: Sequence[Message], reply: str = "", options: Mapping[str, Any] | None = None
    ) -> ChatPrompt:
        """A chat as token ids, up to the point where the reply begins, or where `reply`, its beginning, ends.

        `options`: variables of the chat template, on top of `template_options`. Where the template does not take the
        chat as it is, its form is changed (see `ChatTemplate.render`); each kind of change is logged once.
        Errors: CheckpointError without a chat template, UsageError for a chat that the template refuses in every form;
        those of `encode`.
        """
        chat = self.template.render(messages, reply, self.template_options | dict(options or {}))
        ids = self.encode(chat.text)
        # Not the length without the reply: its first token may have been joined with a space before it.
        head = common_length(self.encode(chat.text[: len(chat.text) - chat.begun]), ids) if chat.begun else len(ids)
        for note in chat.notes:
            self.warn_once(note, note)
        return ChatPrompt(ids, len(ids) - head, chat.opening, chat.notes)

    def warn_once(self, key: str, text: str) -> None:
        """Log a warning about this model, unless there was one with this key."""
        if key not in self._noted:
            self._noted.add(key)
            _log.warning("%s: %s", self.name, text)

    def prompt_ids(self, messages: Sequence[Message], *, thoughts: bool = True) -> list[int]:
        """Token ids of a chat up to the point where the reply begins, with one BOS at most.

        `thoughts`: false asks the template for a reply without thoughts, where it can. Errors: as `prompt`.
        """
        return self.prompt(messages, options=None if thoughts else WITHOUT_THOUGHTS).ids

    def answer_start(self, ids: Sequence[int], opening: str = "") -> int:
        """How many of a reply's first tokens are thoughts, all of them if these do not end. `opening`: the prompt's."""
        text, split = Detokeniser(self.tokenizer, ()), ThoughtSplitter(marks_of(self.tokenizer), opening)
        for i, token in enumerate(ids):
            if split.add(text.add(token))[1]:
                return i if split.opened else 0
        return len(ids) if split.opened else 0

    def detokeniser(self, prompt: Sequence[int] = ()) -> Detokeniser:
        """A Detokeniser for one reply, which ends at `end_text`. `prompt`: the tokens before the text."""
        return Detokeniser(self.tokenizer, prompt, self.end_text)

    def without_end(self, ids: Sequence[int]) -> list[int]:
        """A reply's tokens up to the first that has a part of `end_text` in it."""
        out = list(ids)
        while self.end_text and out:
            text = self.text(out)
            if self.end_text not in text and not begun(text, (self.end_text,)):
                break
            out.pop()
        return out

    def encode(self, text: str, *, frame: bool = False) -> list[int]:
        """Token ids of a text as it is; with `frame`, after the special tokens that the tokenizer puts before a text.

        Errors: UsageError for text that is not Unicode, CheckpointError for a token without a row in the embedding.
        """
        return [*(self.frame if frame else ()), *ids_of(self.tokenizer, [text], self.vocabulary, self.name)[0]]

    @cached_property
    def frame(self) -> tuple[int, ...]:
        """The tokens that the tokenizer puts before a text, such as BOS; there may be none. What it puts after a text,
        as EOS for training, would end a prompt before its reply."""
        plain, framed = (
            ids_of(self.tokenizer, ["a"], self.vocabulary, self.name, frame=around)[0] for around in (False, True)
        )
        return tuple(framed[: next((n for n in range(len(framed)) if framed[n : n + len(plain)] == plain), 0)])

    def check_finite(self, numbers: Tensor) -> None:
        """Raise unless logits or residual streams are finite in every row.

        Errors: CheckpointError that names the dtype: float16 ends at 65504, and activations of some models are larger.
        """
        # The maximum of a row is NaN if any number in it is.
        if not bool(numbers.amax(-1).isfinite().all()):
            raise self.overflow(any(self.steering.rows))

    def overflow(self, steered: bool = False) -> CheckpointError:
        """The error for logits or residual streams that are not finite. `steered`: whether sliders may be the cause."""
        dtype = str(self.hf.dtype).removeprefix("torch.")
        under = " under these sliders" if steered else ""
        return CheckpointError(
            f"{self.name}: expected finite numbers in the forward pass{under}, found NaN or infinity in {dtype}; "
            + ("load it as float32 or bfloat16" if dtype == "float16" else "check the weights")
        )

    def cache_arguments(self, cache: Cache, positions: Tensor) -> dict[str, Any]:
        """The arguments of the decoder for a cache and positions `[rows, new]`: Mamba's decoder has another name for
        the one, and no use for the other."""
        known = self._decoder_arguments
        name = "cache_params" if "cache_params" in known else "past_key_values"
        return {name: cache} | ({"position_ids": positions} if "position_ids" in known else {})

    @cached_property
    def _decoder_arguments(self) -> set[str]:
        return set(signature(self.hf.get_submodule(self.anatomy.decoder_module).forward).parameters)

    @property
    def vocabulary(self) -> int:
        """How many rows the embedding has. A tokenizer may know fewer tokens, or more."""
        return int(self.hf.get_input_embeddings().weight.shape[0])

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @contextmanager
    def untouched(self) -> Iterator[Self]:
        """Run the model without any slider inside the block, for finding and measuring on the unsteered model.

        Other threads that would steer it, or write with it, wait until the block ends.
        """
        with self.steering.alone([None]):
            yield self

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[Self]:
        """Apply an Edit with hooks inside the block: they do what `steer.bake` would write into the weights."""
        with self.steering.applied([edit]):
            yield self

    @contextmanager
    def record(self, sites: Sequence[int] | None = None) -> Iterator[Recording]:
        """Record the residual stream after each block in `sites` (None: every block), for every pass inside.

            with model.record([14]) as recording:
                model.hf(input_ids=ids)
            recording[14]  # [batch, seq, d]

        Indexing gives the last forward pass; `Recording.passes` gives all of them.
        """
        recording = Recording()
        sites = range(self.anatomy.blocks) if sites is None else sites
        with reading(self.hf, self.anatomy, sites, recording.append):
            yield recording


def as_messages(message: str | Sequence[Message], system: str | None = None) -> list[Message]:
    """A chat from a message or a chat, with the system prompt in front if one is given."""
    chat: list[Message] = [{"role": "user", "content": message}] if isinstance(message, str) else list(message)
    return [{"role": "system", "content": system}, *chat] if system else chat

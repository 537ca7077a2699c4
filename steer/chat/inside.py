"""Inside a reply: what traits and features read on each of its tokens, steered as it was and not at all."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.chat.conversation import Message, Stretch
from steer.chat.turns import turns_of
from steer.chat.voice import Task
from steer.chat.words import title_of
from steer.errors import SteerError, UsageError
from steer.live.frame import TextPass
from steer.live.profiles import edit_of
from steer.live.readings import amounts
from steer.live.record import reading
from steer.live.serve.engine import Token
from steer.live.serve.texts import ReplyText
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.sampler import Sampler

if TYPE_CHECKING:
    from steer.chat.local import LocalVoice
    from steer.live.model import SteeredModel

_ROWS = 64
"""Positions whose logits are held in fp32 at a time."""
_KEPT = 8
"""Readings of replies that are kept."""


@dataclass(frozen=True)
class Look:
    """One reply, token by token."""

    pieces: list[str]
    """The text of each token, empty where the token begins a character that a later one ends; joined they are the
    reply."""
    steered: dict[str, list[float]]
    """Name -> what is read on each token, steered as the reply was: in amounts, for a direction 0 without its trait and
    1 with it, for a feature 1 at its unit."""
    plain: dict[str, list[float]]
    """The same text read without sliders."""
    kl: list[float]
    """KL(steered || unsteered) in nats, of the distribution that each token was drawn from."""
    titles: dict[str, str]
    """Name -> what a page calls it."""

    def scale(self, name: str) -> float:
        """The amount that a colour is strongest at: 1, or what nearly all tokens stay below."""
        sizes = sorted(abs(x) for x in (*self.steered[name], *self.plain[name]))
        return max(1.0, sizes[int(0.98 * (len(sizes) - 1))]) if sizes else 1.0

    def heat(self, name: str) -> list[float]:
        """What is read, from -1 to 1, for colours."""
        scale = self.scale(name)
        return [max(-1.0, min(1.0, x / scale)) for x in self.steered[name]]

    def chart(self) -> list[dict[str, Any]]:
        """Rows for a strip chart: token, text, name, title, amount, and under which sliders it was read."""
        return [
            {"token": i, "text": self.pieces[i], "name": name, "title": self.titles[name], "amount": x, "under": under}
            for under, read in (("sliders", self.steered), ("no sliders", self.plain))
            for name, values in read.items()
            for i, x in enumerate(values)
        ]


def look_inside(
    model: SteeredModel,
    prompt: Sequence[int],
    reply: Sequence[int],
    stretches: Sequence[tuple[int, Edit | None]],
    targets: dict[str, Direction | Feature],
) -> Look:
    """Read a reply twice: under what it was written under, and without sliders.

    `stretches`: (first token, edit), what each token was chosen under; what stands before the reply is read as its
    first token was. Every target is read in the same two passes, at its own site, after what is moved there.
    Errors: UsageError for a reply without tokens, and for a direction without a gap.
    """
    if not reply:
        raise UsageError("inside: expected a reply of at least one token, found none")
    for name, target in targets.items():
        if isinstance(target, Direction) and not target.gap:
            raise UsageError(f"inside: direction {name!r}: expected a gap, the unit of amounts, found 0; find it again")
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    start, n = len(prompt), len(reply)
    # Reply token i is written by the pass over the position before it, so that is where its sliders act.
    at = torch.arange(ids.shape[1], device=model.device) - (start - 1)
    moved = [edit for _, edit in stretches] or [None]
    begins = torch.tensor([first for first, _ in stretches][1:], dtype=torch.long, device=model.device)
    row = torch.bucketize(at, begins, right=True)
    steered, own = _read(model, ids, n, tuple(moved), row, at, targets)
    if not any(moved):
        return Look(pieces_of(model, reply), steered, steered, [0.0] * n, dict.fromkeys(targets, ""))
    plain, other = _read(model, ids, n, (None,), None, at, targets)
    return Look(pieces_of(model, reply), steered, plain, _divergence(own, other), dict.fromkeys(targets, ""))


def pieces_of(model: SteeredModel, reply: Sequence[int]) -> list[str]:
    """The text of each token of a reply; joined they are the reply."""
    text = ReplyText(model.tokenizer, [])
    out = [text.add(Token(token, None, (), False)).text for token in reply]
    out[-1] += text.end().text
    return out


@torch.inference_mode()
def _read(
    model: SteeredModel,
    ids: Tensor,
    n: int,
    rows: tuple[Edit | None, ...],
    row: Tensor | None,
    index: Tensor,
    targets: dict[str, Direction | Feature],
) -> tuple[dict[str, list[float]], Float[Tensor, "n vocab"]]:
    """What is read on the last `n` tokens, and the logits that they were drawn from. `row`: the edit of each position;
    they go by it as texts of a server do that are packed into one pass."""
    found: dict[int, Tensor] = {}
    steering = model.steering
    with ExitStack() as stack:
        stack.enter_context(turns_of(model).turn())
        stack.enter_context(steering.alone(list(rows)))
        several = row is not None and len(rows) > 1
        told = TextPass(row=row if several else None, packed=several)
        if steering.timed:
            told.index = index[None]
        stack.enter_context(steering.passing(told))
        sites = sorted({t.site for t in targets.values()})
        stack.enter_context(
            reading(model.hf, model.anatomy, sites, lambda site, h: found.__setitem__(site, h[0, -n:].clone()))
        )
        logits = model.hf(input_ids=ids, use_cache=False, logits_to_keep=n + 1).logits[0, :-1]
    return {name: amounts(t, found[t.site]).float().tolist() for name, t in targets.items()}, logits


@torch.inference_mode()
def _divergence(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> list[float]:
    """KL(p || q) of each row, in nats."""
    out: list[float] = []
    for i in range(0, len(p), _ROWS):
        a, b = (x[i : i + _ROWS].float().log_softmax(-1) for x in (p, q))
        # A token that neither allows has -inf in both.
        parts = torch.where(a.exp() > 0, a.exp() * (a - b), 0.0)
        out += parts.sum(-1).clamp(min=0).tolist()
    return out


class Looks:
    """Looks into the replies of a chat; the last ones are kept."""

    def __init__(self, voice: LocalVoice) -> None:
        self._voice = voice
        self._kept: OrderedDict[Any, Look] = OrderedDict()

    def at(self, message: Message, chat: tuple[dict[str, str], ...], sampler: Sampler, names: Sequence[str]) -> Look:
        """A reply to a chat, read by sliders' names. Errors: SteerError for a name that is not known."""
        voice = self._voice
        sliders = {name: voice.sliders.slider(name) for name in names}
        targets = {name: s.target for name, s in sliders.items()}
        key = (message.id, message.text, json.dumps(chat), tuple((n, id(t)) for n, t in targets.items()))
        if key not in self._kept:
            written = message.written
            ids = list(written.ids) if written is not None and written.ids else []
            ids = ids or voice.model.encode(message.text)
            # Not the chat's own: to look at an old reply is not to have read less of the chat.
            left_out = voice.left_out
            try:
                prompt = voice.prompt(Task(chat, sampler), len(ids))
            finally:
                voice.left_out = left_out
            stretches = written.stretches if written is not None else ()
            edits = [(s.start, self._edit(s)) for s in stretches]
            look = look_inside(voice.model, prompt, ids, edits, targets)
            titles = {name: title_of(s) for name, s in sliders.items()}
            self._kept[key] = Look(look.pieces, look.steered, look.plain, look.kl, titles)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _edit(self, stretch: Stretch) -> Edit | None:
        """What a reply went by, from its profile where it comes from disk. Errors: SteerError for a slider that is not
        there any more."""
        if stretch.edit is not None or stretch.profile is None:
            return stretch.edit
        try:
            return edit_of(self._voice.model, stretch.profile)
        except SteerError as e:
            raise UsageError(f"inside: this reply was written under sliders that are not here: {e}") from e

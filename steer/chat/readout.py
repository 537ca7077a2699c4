"""Readings of traits and features on every token of a reply, once under its sliders and once without any.

`steer.chat.chat.Chat.inside` calls `Readouts.at`, and the page part `inside` draws the `TokenReadout`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.chat.conversation import Message, SettingsSpan
from steer.chat.descriptions import title_of
from steer.chat.local import LocalBackend, turns_of
from steer.chat.writer import Messages, Task
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.sampler import Sampler
from steer.core.slider import Slider
from steer.errors import SteerError, UsageError
from steer.model.profiles import edit_of
from steer.model.record import reading
from steer.model.steering.low_rank import ForwardContext, amounts
from steer.model.tokens import Detokeniser
from steer.model.written import WrittenText

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

_ROWS = 64
"""Positions whose logits are converted to fp32 at the same time."""
_CACHED = 8
"""How many readouts are cached."""


@dataclass(frozen=True)
class TokenReadout:
    """What was read on each token of one reply."""

    pieces: list[str]
    """The text of each token; joined they give the reply. Empty for a token whose character a later token completes."""
    steered: dict[str, list[float]]
    """Slider name -> reading on each token, under the sliders of the reply. The unit is amounts: for a direction, 0 is
    the mean without the trait and 1 the mean with it; for a feature, 1 is its unit."""
    plain: dict[str, list[float]]
    """The same readings of the same text without sliders."""
    kl: list[float]
    """For each token, KL(steered || unsteered) in nats between the distributions that it could be drawn from."""
    titles: dict[str, str]
    """Slider name -> title on the page."""

    def scale(self, name: str) -> float:
        """Return the amount at which the colour is strongest: the 98 % quantile of the readings, at least 1."""
        sizes = sorted(abs(x) for x in (*self.steered[name], *self.plain[name]))
        return max(1.0, sizes[int(0.98 * (len(sizes) - 1))]) if sizes else 1.0

    def heat(self, name: str) -> list[float]:
        """Return the steered readings scaled to -1 to 1, for colours."""
        scale = self.scale(name)
        return [max(-1.0, min(1.0, x / scale)) for x in self.steered[name]]

    def chart(self) -> list[dict[str, Any]]:
        """Return rows for a strip chart: token, text, name, title, amount, and under which sliders it was read."""
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
    sliders: Mapping[str, Slider],
) -> TokenReadout:
    """Read a reply twice: under the sliders with which it was written, and without sliders.

    `prompt`, `reply`: token ids. `stretches`: (index of the first reply token, edit) for each setting in the reply. The
    prompt is read under the settings of the reply's first token. `sliders`: name -> slider whose target is read. All
    targets are read in the same two passes, each at its own site, after the edit there has acted.
    Errors: UsageError for a reply without tokens, and for a direction without a gap.
    """
    if not reply:
        raise UsageError("inside: expected a reply of at least one token, found none")
    targets = {name: slider.target for name, slider in sliders.items()}
    for name, target in targets.items():
        if isinstance(target, Direction) and not target.gap:
            raise UsageError(f"inside: direction {name!r}: expected a gap, the unit of amounts, found 0; find it again")
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    start, n = len(prompt), len(reply)
    # Reply token i is predicted at the position before it, so its sliders act at that position.
    at = torch.arange(ids.shape[1], device=model.device) - (start - 1)
    answer = WrittenText(model.tokenizer, [*prompt, *reply], start).answer
    edits = [edit for _, edit in stretches] or [None]
    begins = torch.tensor([first for first, _ in stretches][1:], dtype=torch.long, device=model.device)
    row = torch.bucketize(at, begins, right=True)
    steered, steered_logits = _read(model, ids, n, edits, row, at, answer, targets)
    plain, kl = steered, [0.0] * n
    if any(edits):
        plain, plain_logits = _read(model, ids, n, [None], row, at, answer, targets)
        kl = _divergence(steered_logits, plain_logits)
    titles = {name: title_of(slider) for name, slider in sliders.items()}
    return TokenReadout(pieces_of(model, reply), steered, plain, kl, titles)


def pieces_of(model: SteeredModel, reply: Sequence[int]) -> list[str]:
    """Return the text of each token of a reply; joined they give the reply."""
    text = Detokeniser(model.tokenizer, ())
    out = [text.add(token) for token in reply]
    out[-1] += text.end()
    return out


@torch.inference_mode()
def _read(
    model: SteeredModel,
    ids: Tensor,
    n: int,
    edits: list[Edit | None],
    row: Tensor,
    index: Tensor,
    answer: int,
    targets: Mapping[str, Direction | Feature],
) -> tuple[dict[str, list[float]], Float[Tensor, "n vocab"]]:
    """Return the readings on the last `n` tokens, and the logits from which these tokens were drawn.

    `row`: for each position, the index of its edit in `edits`, as for texts packed into one pass. `index`: for each
    position, the number of the reply token that it predicts, for schedules. `answer`: as `WrittenText.answer`.
    """
    found: dict[int, Tensor] = {}
    steering, sites = model.steering, sorted({t.site for t in targets.values()})
    with turns_of(model).turn(), steering.alone(edits):
        several = len(edits) > 1
        context = ForwardContext(row=row if several else None, packed=several)
        if steering.timed:
            context.index, context.answer = index[None], torch.full_like(index[None], answer)
        with (
            steering.passing(context),
            reading(model.hf, model.anatomy, sites, lambda site, h: found.__setitem__(site, h[0, -n:].clone())),
        ):
            logits = model.hf(input_ids=ids, use_cache=False, logits_to_keep=n + 1).logits[0, :-1]
    return {name: amounts(t, found[t.site]).float().tolist() for name, t in targets.items()}, logits


@torch.inference_mode()
def _divergence(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> list[float]:
    """Return KL(p || q) of each row, in nats; `p` and `q` are logits."""
    out: list[float] = []
    for i in range(0, len(p), _ROWS):
        a, b = (x[i : i + _ROWS].float().log_softmax(-1) for x in (p, q))
        # A token that neither distribution allows has -inf in both.
        parts = torch.where(a.exp() > 0, a.exp() * (a - b), 0.0)
        out += parts.sum(-1).clamp(min=0).tolist()
    return out


class Readouts:
    """Makes readouts of a chat's replies and caches the last ones."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        self._cached: dict[Any, TokenReadout] = {}

    def at(self, message: Message, chat: Messages, sampler: Sampler, names: Sequence[str]) -> TokenReadout:
        """Return the readout of a reply. `chat`: the messages before it. `names`: the sliders whose targets are read.

        Errors: SteerError for an unknown name.
        """
        backend = self._backend
        sliders = {name: backend.sliders.slider(name) for name in names}
        key = (message.id, message.text, json.dumps(chat), tuple((n, id(s.target)) for n, s in sliders.items()))
        if key not in self._cached:
            written = message.written
            ids = (written.ids if written is not None else ()) or backend.model.encode(message.text)
            # Restored afterwards, because `prompt` sets it for the chat, and this prompt is of an old reply.
            left_out = backend.left_out
            try:
                prompt = backend.prompt(Task(chat, sampler, ids=tuple(ids))).ids
            finally:
                backend.left_out = left_out
            edits = [(s.start, self._edit(s)) for s in (written.stretches if written is not None else ())]
            self._cached[key] = look_inside(backend.model, prompt, ids, edits, sliders)
            if len(self._cached) > _CACHED:
                del self._cached[next(iter(self._cached))]
        return self._cached[key]

    def _edit(self, stretch: SettingsSpan) -> Edit | None:
        """Return the edit of a span, looked up by its profile if the chat was loaded from disk.

        Errors: SteerError for a slider that does not exist any more.
        """
        if stretch.edit is not None or stretch.profile is None:
            return stretch.edit
        try:
            return edit_of(self._backend.model, stretch.profile)
        except SteerError as e:
            raise UsageError(f"inside: this reply was written under sliders that are not here: {e}") from e

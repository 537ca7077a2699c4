"""The seam between a chat and what writes its replies: a task, a draft that grows token by token, and who makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from steer.chat.conversation import Ending, Message, Stretch
from steer.values.sampler import Sampler

if TYPE_CHECKING:
    from steer.values.profile import Profile


@dataclass(frozen=True)
class Task:
    """A reply that is to be written."""

    messages: tuple[dict[str, str], ...]
    """The chat that it replies to, a system prompt in front where there is one."""
    sampler: Sampler
    """Its seed is the reply's."""
    text: str = ""
    """How the reply begins already."""
    ids: tuple[int, ...] = ()
    """The tokens of `text`, where they are known."""
    nudge: bool = False
    """Not to end at once: the model had ended the reply, and is asked for more."""


class Draft(Protocol):
    """A reply in the making. Used by one thread."""

    ending: Ending
    """Why it came to an end, once it has."""

    @property
    def text(self) -> str:
        """So far, with what it began with; characters are whole."""
        ...

    @property
    def tokens(self) -> int:
        """Written so far."""
        ...

    def step(self) -> bool:
        """Write another token, or wait for it. False once there is none. Errors: SteerError."""
        ...

    def close(self) -> None:
        """Let go of what it holds, ended or not; called in the end, whatever happened."""
        ...

    @property
    def ids(self) -> Sequence[int]:
        """All its tokens; none where they are not known."""
        ...

    @property
    def stretches(self) -> Sequence[Stretch]:
        """Every setting that it met."""
        ...

    def receipt(self) -> dict[str, Any] | None:
        """What the sliders did to it, so far as is known."""
        ...


class Voice(Protocol):
    """What a chat's replies come from. One a chat: it holds what was read of it."""

    name: str
    """The model's."""
    can: frozenset[str]
    """Of `inside`, `duel`, `bake`, `features`, `reread`, `reshape`: what there is beside chatting."""
    felt: str
    """What a slider that moves during a reply does to it, in a sentence for people."""
    sliders: Any
    """Amounts by name, with all that `steer.live.sliders.Sliders` has."""
    on: bool
    """False: the sliders stand where they stand and move nothing."""
    left_out: int
    """How many messages at the beginning of the last chat did not fit into the context."""

    def draft(self, task: Task) -> Draft:
        """Begin a reply. Errors: SteerError for a chat that cannot be replied to; then nothing was begun."""
        ...

    def profile(self, name: str, sampler: Sampler) -> Profile:
        """The sliders as they stand, and a sampler. Errors: UsageError for what has no name to be found by."""
        ...

    def use(self, profile: Profile) -> None:
        """Let a profile's sliders stand and no others. Errors: SteerError."""
        ...

    def reread(self) -> None:
        """Have all of the chat read again under the sliders of now."""
        ...

    def close(self) -> None:
        """Let go of what it keeps."""
        ...


def as_chat(messages: Sequence[Message], system: str | None = None) -> tuple[dict[str, str], ...]:
    """Messages as chat templates want them: roles in turns. Those of one role that follow each other become one."""
    out: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for m in messages:
        if out and out[-1]["role"] == m.role:
            out[-1] = {"role": m.role, "content": f"{out[-1]['content']}\n\n{m.text}"}
        else:
            out.append({"role": m.role, "content": m.text})
    return tuple(out)

"""How the prompt of the last reply fills the model's context."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ContextUse:
    """Tokens of the last reply's prompt, by their purpose."""

    system: int
    """The card or system prompt, without entries of lorebooks."""
    lorebook: int
    """Active entries of lorebooks, wherever they stand."""
    history: int
    """The messages, and what the chat template writes around them."""
    reply: int
    """The most that the reply may have of the rest."""
    context: int
    """The most that the model can read."""

    @classmethod
    def of(cls, prompt: int, system: int, lorebook: int, most: int, context: int) -> ContextUse:
        """`prompt`: tokens of the whole prompt. `most`: tokens that the reply may have."""
        return cls(system, lorebook, max(0, prompt - system - lorebook), min(most, max(0, context - prompt)), context)

    @property
    def parts(self) -> dict[str, int]:
        """The tokens by a name for people, in the order in which the model reads them."""
        return {
            "card and system prompt": self.system, "lorebook": self.lorebook, "history": self.history,
            "room for the reply": self.reply,
        }  # fmt: skip

    def describe(self) -> str:
        """Return one line: every part with its tokens, and the tokens that are free."""
        parts = ", ".join(f"{name} {tokens:,}" for name, tokens in self.parts.items() if tokens)
        return f"{parts}, free {max(0, self.context - sum(self.parts.values())):,} of {self.context:,} tokens"

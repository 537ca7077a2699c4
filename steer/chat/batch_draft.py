"""Several replies that are written together, token by token, while other chats of the model go on."""

from __future__ import annotations

from collections.abc import Sequence

from steer.chat.local import LocalBackend
from steer.chat.writer import PendingReply
from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.model.decode import decode
from steer.model.loaded import ChatPrompt
from steer.model.steering.receipts import Tally


class BatchRow:
    """One of the replies, as far as it is written."""

    ended = False

    def __init__(self, backend: LocalBackend, text: str) -> None:
        self.text = text
        self.ids: list[int] = []
        self.pieces = backend.model.detokeniser()


class BatchDraft(PendingReply):
    """Replies in one batch, each to a prompt and under an edit, with the same random draws.

    `ending` is that of a reply that the model did not end itself.
    """

    def __init__(
        self, backend: LocalBackend, prompts: Sequence[ChatPrompt], edits: Sequence[Edit | None], sampler: Sampler
    ) -> None:
        super().__init__()
        self.tally = Tally()
        self.rows = tuple(BatchRow(backend, prompt.opening) for prompt in prompts)
        self._backend, self._edits = backend, list(edits)
        # All replies have the same key: as long as the texts of two agree they make the same draws.
        ids, keys = [prompt.ids for prompt in prompts], [0] * len(prompts)
        self._steps = decode(backend.model, ids, sampler, keys, tally=self.tally)

    def step(self) -> bool:
        """Write one token of each reply that has not ended. Return False if all have ended."""
        model = self._backend.model
        with self._backend.turns.turn(), model.steering.alone(self._edits):
            step = next(self._steps, None)
        if step is None:
            return False
        for number, token in zip(step.rows, step.tokens, strict=True):
            row = self.rows[number]
            if row.ended:  # at a text, which does not end it for `decode`
                continue
            if token in model.end_token_ids:
                row.ended = True
                row.text += row.pieces.end()
                continue
            row.ids.append(token)
            row.text += row.pieces.add(token)
            self.tokens += 1
            if row.pieces.ended:
                row.ended, row.ids = True, model.without_end(row.ids)
        return not all(row.ended for row in self.rows)

    def close(self) -> None:
        """Stop decoding."""
        self._steps.close()  # pyright: ignore[reportAttributeAccessIssue]

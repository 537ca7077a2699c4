"""What a model answers under each of the two sentences of a new slider, before its direction is searched for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from steer.chat.batch_draft import BatchDraft
from steer.chat.local import LocalBackend
from steer.chat.writer import ReplyBackend, Writer
from steer.core.thoughts import split_thoughts
from steer.core.trait import Trait, spread
from steer.errors import UsageError
from steer.measure.contrast import SAMPLER
from steer.model.loaded import WITHOUT_THOUGHTS, as_messages

TOPICS, TOKENS = 2, 40
"""Number of replies under each sentence, and their length in tokens."""


@dataclass(frozen=True)
class PreviewReply:
    """A message, and the replies to it under the two sentences, as far as they are written."""

    message: str
    high: str
    """Under the sentence."""
    low: str
    """Under the opposite, or under no sentence."""


class Preview(Writer):
    """Writes the replies in a background thread, in one batch; a server writes them one by one. They are of the kind
    that the search compares: to topics of the trait, sampled as there, under no slider."""

    def __init__(self, backend: ReplyBackend, trait: Trait) -> None:
        """Start to write. Errors: UsageError for a sentence that does not fit the context of a model of this process,
        and for a server that lets nobody search."""
        if not backend.finds:
            raise UsageError(f"{backend.name}: expected a server that searches, found another; --allow-find lets it")
        super().__init__()
        self.trait = trait
        self._topics, self._marks = spread(trait.held_out, TOPICS), backend.marks
        chats = [
            as_messages(topic, sentence)
            for topic in self._topics
            for sentence in (trait.with_instruction, trait.without_instruction)
        ]
        sampler = replace(SAMPLER, max_new_tokens=TOKENS)
        if isinstance(backend, LocalBackend):
            prompts = [backend.model.prompt(chat, options=WITHOUT_THOUGHTS) for chat in chats]
            self._draft = BatchDraft(backend, prompts, [None] * len(prompts), sampler)
        else:
            from steer.chat.remote_search import RemoteBatch  # with openai, which takes long to import

            self._draft = RemoteBatch(backend, chats, sampler)
        self.start(self._draft)

    @property
    def replies(self) -> list[PreviewReply]:
        """The replies so far, a pair for each message."""
        texts = [split_thoughts(row.text, self._marks)[1] for row in self._draft.rows]
        return [PreviewReply(*row) for row in zip(self._topics, texts[::2], texts[1::2], strict=True)]

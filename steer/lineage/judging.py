"""Judging blind: two replies of two nodes to one chat, written ahead in the background, and the vote between them.

A `Judge` answers the next prompts with every node that the next votes may ask for, in a thread, while the person reads.
As many models are held at once as memory allows, but one at least; with one, a node answers several prompts before the
next is loaded. Replies are small files in LINEAGE/replies, so that a model answers a prompt once.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from itertools import count, islice, product
from pathlib import Path
from typing import Annotated, Literal

import psutil
import torch
from pydantic import Field

from steer.checkpoint.dtypes import ROOM, computing_in
from steer.checkpoint.reader import CheckpointFiles
from steer.core.edit import Edit
from steer.core.names import check_name
from steer.core.profile import Profile
from steer.core.sampler import CHAT, Sampler
from steer.core.small_files import load_yaml
from steer.core.validation import Text, checked, from_file
from steer.errors import UsageError
from steer.files import read_json_object, write_atomic_json
from steer.lineage.lineage import REPLIES, Lineage, Outcome, Vote
from steer.lineage.ratings import Standing, ranked_pairs, standing
from steer.model.loaded import WITHOUT_THOUGHTS, Message
from steer.model.loading import release_memory
from steer.model.profiles import edit_of
from steer.model.steered import SteeredModel, load
from steer.plain_text import without_surrogates

Messages = tuple[tuple[str, str], ...]
"""(role, text) of each message of a chat."""
Pair = tuple[str, str]
Choice = Literal["left", "right", "same", "bad"]
REPLY = replace(CHAT, max_new_tokens=160)
"""Sampler of the replies: the chat's, with a length that one reads in half a minute."""
AHEAD = 16
"""How many prompts are answered, the one that is shown among them. A node answers as many as it can at once, and goes
on when half of them are used: sixteen replies in one batch take hardly longer than one."""
AT_FIRST = 4
"""How many prompts are answered at once while a person waits, so that the next votes need not wait for other nodes."""
UNLIKELY = 0.01
"""Nodes that are the best with a smaller probability are not asked ahead."""
FREE = 0.8
"""Share of the free memory that another model may take."""
PATIENCE = 0.5
"""The patience of people, seconds; see `Judge`."""
TURNS = 8
"""Votes after which a scene ends and another begins."""
ALIKE = 3
"""Prompts to which two nodes gave the same reply, after which they are not compared again."""


@checked
class Prompts:
    """The prompts that ship."""

    openings: Annotated[list[Text], Field(min_length=1)]
    """First messages of a chat."""
    next: Annotated[list[Text], Field(min_length=1)]
    """Messages that a scene can go on with, whatever the reply before was."""

    @classmethod
    @cache
    def shipped(cls) -> Prompts:
        """Read the file that ships."""
        file = resources.files("steer") / "lineage" / "prompts.yaml"
        return from_file(cls, load_yaml(file.read_bytes(), "prompts.yaml", "prompts"), "prompts.yaml")


@dataclass(frozen=True)
class BlindPair:
    """Two replies to one chat. Whose they are is not shown before the vote."""

    chat: Messages
    """The chat; its last message is the one that both reply to."""
    left: str
    right: str
    nodes: Pair = field(repr=False)
    """The nodes of the left and the right reply."""


@dataclass(frozen=True)
class _Task:
    """A chat to reply to, and the seed of the replies."""

    chat: Messages
    seed: int = 0


class Judge:
    """Shows pairs of replies of a lineage's nodes to one voter, and keeps the votes. Use as a context manager, or
    `close` it.

        with Judge(Lineage("lineage"), "kim") as judge:
            blind_pair = judge.blind_pair()
            judge.vote(blind_pair, "left")
            print(judge.standing.line)
    """

    def __init__(
        self,
        lineage: Lineage,
        voter: str,
        *,
        scene: bool = False,
        prompt: str | None = None,
        checkpoint: Callable[[str], Path] | None = None,
        sampler: Sampler = REPLY,
        most: int | None = None,
        seed: int | None = None,
        patience: float = PATIENCE,
    ) -> None:
        """Start to write ahead.

        `scene`: the reply that is chosen becomes part of the chat, which goes on. `prompt`: the first message of each
        chat; by default one that ships. `checkpoint`: returns a node's merged checkpoint, and may merge it again; by
        default the one in the lineage. `most`: how many models are held at once at most; None: as many as memory
        allows. `seed`: of the sides and of ties; None: a different one each time. `patience`: seconds after which a
        less informative pair, whose replies are written, is shown in place of the best pair; a program that votes can
        wait (math.inf).
        Errors: UsageError for a lineage without two nodes to compare, a voter whose name cannot be a file's, and an
        empty prompt.
        """
        check_name(voter, "--voter")
        self.lineage, self.voter, self.scene, self.sampler = lineage, voter, scene, sampler
        self._patience = patience
        self._rng = random.Random(seed)
        self._openings = list(Prompts.shipped().openings)
        random.Random(f"{lineage.settings.seed} {voter}").shuffle(self._openings)
        if prompt is not None:
            self._openings = [_some_text(prompt, "--prompt")]
        self._message: str | None = None
        self._writing: list[_Task] = []
        self._story: Messages = ()
        """The scene so far, up to the reply that was chosen last."""
        self._shown: BlindPair | None = None
        self._past: list[tuple[Vote, Messages, BlindPair]] = []
        """Each vote of this session, the scene before it, and what was shown."""
        self._alike: dict[Pair, set[_Task]] = {}
        self._replies: dict[tuple[_Task, str], str] = {}
        self._models = _Models(lineage, checkpoint or lineage.model, sampler, most)
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        self._update()
        if len(self.standing.ratings) < 2:
            raise UsageError(f"{lineage.place}: expected two nodes to compare, found {self.standing.leader} alone; "
                             "build a generation first")  # fmt: skip
        self._thread = threading.Thread(target=self._write, name="replies", daemon=True)
        self._thread.start()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop writing, at the next token or when the model that is being loaded is there, and let go of the models."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._models.clear()

    def blind_pair(self, wait: float | None = None) -> BlindPair | None:
        """Return the pair of replies to vote on, the same one until the vote.

        `wait`: seconds after which None is returned if the replies are not written; None waits as long as it takes.
        Errors: those of loading and running a model; UsageError if all nodes write the same replies.
        """
        start = time.monotonic()
        with self._changed:
            if self._shown is None:
                self._update()
            while self._shown is None:
                if self._error is not None:
                    error, self._error, self._message = self._error, None, None  # the next call tries again
                    self._update()
                    raise error
                if self._stopped:
                    raise UsageError("judging: expected one that is not closed")
                waited = time.monotonic() - start
                self._shown = self._ready(self._pairs if waited >= self._patience else self._pairs[:1])
                if sum(map(len, self._alike.values())) > self._planned_alike:
                    self._update()
                elif self._shown is None:
                    if wait is not None and waited >= wait:
                        return None
                    patience = self._patience if waited < self._patience else math.inf
                    rest = min(math.inf if wait is None else wait, patience) - waited
                    self._changed.wait(rest if math.isfinite(rest) else None)
            self._plan()
            return self._shown

    def vote(self, blind_pair: BlindPair, choice: Choice) -> Outcome:
        """Keep a vote on the pair that is shown, and return it as it is kept. `standing` counts it.

        Errors: UsageError for a pair that is not shown any longer, and as `Lineage.vote`.
        """
        with self._changed:
            if self._shown is not blind_pair:
                raise UsageError("vote: expected the pair that is shown, found another; look at the new one")
            first = "a" if blind_pair.nodes[0] < blind_pair.nodes[1] else "b"
            (a, reply_a), (b, reply_b) = sorted(zip(blind_pair.nodes, (blind_pair.left, blind_pair.right), strict=True))
            outcome: Outcome = (
                choice if choice in ("same", "bad") else "a" if (choice == "left") == (first == "a") else "b"
            )
            vote = self.lineage.vote(
                a, b, outcome, chat=blind_pair.chat, replies=[reply_a, reply_b], left=first, voter=self.voter
            )
            self._past.append((vote, self._story, blind_pair))
            self._shown = self._message = None
            if self.scene:
                better = choice if choice in ("left", "right") else self._rng.choice(("left", "right"))
                self._story = (*blind_pair.chat, ("assistant", getattr(blind_pair, better)))
                if len(self._story) >= 2 * TURNS:
                    self._story = ()
            self._update()
            return outcome

    def undo(self) -> None:
        """Take this voter's last vote back; if it was made here, its pair is shown again.

        Errors: UsageError for a voter without votes.
        """
        with self._changed:
            undone, self._message, self._shown = self.lineage.undo(self.voter), None, None
            if self._past and self._past[-1][0] == undone:
                _, self._story, self._shown = self._past.pop()
            self._update()

    def say(self, text: str) -> None:
        """Have the next replies answer this message: the next one of a scene, or else the first of a chat. A pair that
        is shown is dropped. Errors: UsageError for empty text."""
        with self._changed:
            self._message, self._shown = _some_text(text, "message"), None
            self._update()

    @property
    def suggestion(self) -> str | None:
        """The message with which a scene goes on unless `say` gives another; None where a chat begins."""
        return _suggestion(self._story)

    def _update(self) -> None:
        """Read the votes of everyone again, and plan what is written next."""
        self.standing: Standing = standing(self.lineage)
        votes = [v for v in self.lineage.votes if v.voter == self.voter and len(v.chat) == 1]
        self._used = Counter(v.chat[0][1] for v in votes)
        """How often this voter has voted on an opening."""
        self._planned_alike = sum(map(len, self._alike.values()))
        """How many equal replies the plan knows of; the thread may find more."""
        pairs = ranked_pairs(self.standing)
        self._pairs = [p for p in pairs if len(self._alike.get(p, ())) < ALIKE]
        if pairs and not self._pairs:
            raise UsageError(
                f"{self.lineage.place}: expected nodes that differ, found that all of "
                f"{', '.join(self.standing.ratings)} write the same replies; build another generation"
            )
        self._plan()

    def _plan(self) -> None:
        """Decide which chats are answered next, and wake the thread."""
        with self._changed:
            self._tasks = self._upcoming()
            self._changed.notify_all()

    def _upcoming(self) -> list[_Task]:
        """The chats that replies are written to, the most urgent first."""
        if not self.scene:
            tries = self._tries((("user", self._message),), self._used[self._message]) if self._message else []
            return [*tries, *islice(self._first_messages(), AHEAD)]
        if self._shown is None:
            return self._tries(self._with_message(self._story, self._message))
        # The scene may go on with either reply.
        stories = [(*self._shown.chat, ("assistant", reply)) for reply in (self._shown.left, self._shown.right)]
        return [_Task(chat) for chat in dict.fromkeys(map(self._with_message, stories))]

    def _tries(self, chat: Messages, seed: int = 0) -> list[_Task]:
        """A chat with a seed, and with one more where two nodes gave the same replies."""
        tries = max((sum(task.chat == chat for task in tasks) for tasks in self._alike.values()), default=0)
        return [_Task(chat, seed + i) for i in range(tries + 1)]

    def _first_messages(self) -> Iterator[_Task]:
        """Openings in this voter's order, those that the voter has not voted on first."""
        for turn in count():
            yield from (_Task((("user", text),), turn) for text in self._openings if self._used[text] <= turn)

    def _with_message(self, story: Messages, text: str | None = None) -> Messages:
        """A scene with the user's next message; a new scene after `TURNS`."""
        if len(story) >= 2 * TURNS:
            story = ()
        text = text or _suggestion(story) or next(self._first_messages()).chat[0][1]
        return (*story, ("user", text))

    def _ready(self, pairs: Sequence[Pair]) -> BlindPair | None:
        """The first pair that has two different replies to one chat, on sides drawn at random."""
        if (found := self._written(pairs)) is None:
            return None
        task, sides = found
        self._rng.shuffle(sides)
        (left, first), (right, second) = sides
        return BlindPair(task.chat, left, right, (first, second))

    def _written(self, pairs: Sequence[Pair]) -> tuple[_Task, list[tuple[str, str]]] | None:
        """A chat, and its replies with their nodes, of the first pair that has two different ones."""
        tasks = [task for task in self._tasks if self._message in (None, task.chat[-1][1])]
        for pair, task in product(pairs, tasks):
            a, b = (self._reply(task, node) for node in pair)
            if a is None or b is None:
                continue
            if a == b:
                self._alike.setdefault(pair, set()).add(task)
                continue
            return task, [(a, pair[0]), (b, pair[1])]
        return None

    def _reply(self, task: _Task, node: str) -> str | None:
        """A reply that is written; None if it is not."""
        if (task, node) not in self._replies:
            file = self._file(task, node)
            if not file.is_file():
                return None
            self._replies[task, node] = read_json_object(file, what="a reply", do="delete it")["reply"]
        return self._replies[task, node]

    def _file(self, task: _Task, node: str) -> Path:
        key = json.dumps([task.chat, task.seed, asdict(self.sampler)])
        return self.lineage.place / REPLIES / hashlib.sha256(key.encode()).hexdigest()[:16] / f"{node}.json"

    def _write(self) -> None:
        """Write replies until `close`. An error waits for the next `blind_pair`, which raises it."""
        while (job := self._job()) is not None:
            node, self._writing = job
            tasks = self._writing
            try:
                replies = self._models.replies(node, tasks, self._check)
                for task, reply in zip(tasks, replies, strict=True):
                    kept = {"chat": task.chat, "seed": task.seed, "node": node, "reply": reply}
                    write_atomic_json(self._file(task, node), kept)
            except _StoppedError:
                continue
            except Exception as e:
                with self._changed:
                    self._error = e
            with self._changed:
                self._changed.notify_all()

    def _check(self, tokens: int) -> None:
        awaited = self._message if self._shown is None else None
        if self._stopped or (awaited and all(task.chat[-1][1] != awaited for task in self._writing)):
            raise _StoppedError

    def _job(self) -> tuple[str, list[_Task]] | None:
        """Wait for replies to write, and return a node and the chats that it answers; None after `close`."""
        with self._changed:
            while not self._stopped:
                if self._pairs and self._error is None and (job := self._next_job()):
                    return job
                self._changed.wait()
            return None

    def _next_job(self) -> tuple[str, list[_Task]] | None:
        likely = [node for node, rating in self.standing.ratings.items() if rating.best >= UNLIKELY]
        nodes = dict.fromkeys(node for pair in self._pairs for node in pair if node in (*self._pairs[0], *likely))
        missing = {node: [t for t in self._tasks if self._reply(t, node) is None] for node in nodes}
        waiting = self._shown is None and self._written(self._pairs) is None
        if waiting:
            for node in self._pairs[0]:
                if self._tasks[0] in missing[node]:
                    return node, self._tasks[: 1 if self._message else AT_FIRST]
        for node in sorted(nodes, key=lambda node: node not in self._models.held):
            due = len(missing[node]) >= AHEAD // 2 or any(task in missing[node] for task in self._tasks[:2])
            if missing[node] and (due or waiting):
                return node, missing[node]
        return None


class _StoppedError(Exception):
    """The judge was closed while replies were written ahead, or a person waits for others."""


class _Models:
    """The models in memory, with the sliders that their nodes carry. Used by one thread at a time."""

    def __init__(self, lineage: Lineage, checkpoint: Callable[[str], Path], sampler: Sampler, most: int | None) -> None:
        self.lineage, self.checkpoint, self.sampler, self.most = lineage, checkpoint, sampler, most
        self.held: OrderedDict[str, tuple[SteeredModel, Edit | None]] = OrderedDict()
        """By node, the one that wrote last at the end."""

    def replies(self, node: str, tasks: Sequence[_Task], on_tokens: Callable[[int], None]) -> list[str]:
        """Return a node's replies, without thoughts."""
        if node not in self.held:
            self._load(node)
        self.held.move_to_end(node)
        model, edit = self.held[node]
        chats = [self._within_context(model, task.chat) for task in tasks]
        made = model.replies(
            chats, self.sampler, [edit] * len(tasks), keys=[t.seed for t in tasks], on_tokens=on_tokens, thoughts=False
        )
        openings = [model.prompt(chat, options=WITHOUT_THOUGHTS).opening for chat in chats]
        return [
            model.text(ids[model.answer_start(ids, opening) :]).strip()
            for ids, opening in zip(made, openings, strict=True)
        ]

    def clear(self) -> None:
        """Let go of all models."""
        self.held.clear()
        release_memory()

    def _load(self, name: str) -> None:
        place, node = self.checkpoint(name), self.lineage.node(name)
        needed = _memory(place)
        while self.held and (len(self.held) == self.most or needed > FREE * _free()):
            self.held.popitem(last=False)
            release_memory()
        model = load(place, name=f"{self.lineage.place}: a node")  # messages must not say which
        where = f"{self.lineage.place}: node {name}: profile"
        profile = None if node.profile is None else Profile.parse(node.profile, where, self.lineage.place)
        self.held[name] = model, None if profile is None else edit_of(model, profile)

    def _within_context(self, model: SteeredModel, chat: Messages) -> list[Message]:
        """The chat without its oldest turns, if it and the reply are longer than the context."""
        messages: list[Message] = [{"role": role, "content": text} for role, text in chat]
        while len(messages) > 2 and (
            len(model.prompt_ids(messages, thoughts=False)) + self.sampler.max_new_tokens > model.context
        ):
            messages = messages[2:]
        return messages


def _memory(place: Path) -> float:
    """Bytes that a checkpoint's weights take in memory, in the dtype in which it is computed."""
    tensors = CheckpointFiles.open(place).tensors.values()
    dtype = computing_in(str(place)).dtype
    return ROOM * sum(t.nbytes if dtype is None else math.prod(t.shape) * dtype.itemsize for t in tensors)


def _free() -> int:
    """Bytes of memory that models can take, on the GPU if there is one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def _suggestion(story: Messages) -> str | None:
    """A message that a scene can go on with, the same one for the same scene."""
    if not story:
        return None
    texts = Prompts.shipped().next
    return texts[(zlib.crc32(story[0][1].encode()) + len(story) // 2) % len(texts)]


def _some_text(text: str, where: str) -> str:
    if not text.strip():
        raise UsageError(f"{where}: expected some text, found none; write a message")
    return without_surrogates(text.strip())

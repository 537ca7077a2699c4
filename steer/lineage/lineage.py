"""A lineage on disk: generations of merges, what each changed, the votes on them, and which one is best so far.

    LINEAGE/
      lineage.json            the pool of models, and how many children a generation has
      generations/0003.json   one whole generation: recipes, moves, hashes and what the gate measured; never changed
      votes/NAME.jsonl        what one voter chose, a line per vote or vote taken back, added and synced one by one
      models/3b/              the merged checkpoint of a node in the race; others are made again from their recipes
      replies/                replies that were written ahead

A generation's file appears when all of its children are merged and measured. Until then the lineage is as before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import to_jsonable_python

from steer.core.names import check_name
from steer.core.validation import Bool, Count, Line, Number, Text, checked, from_file
from steer.errors import CheckpointError, UsageError
from steer.files import append_line, parse_json, read_json_object, write_atomic_json

SETTINGS, GENERATIONS, VOTES, MODELS, REPLIES = "lineage.json", "generations", "votes", "models", "replies"
MoveKind = Literal["start", "add", "remove", "base", "weight", "method", "profile"]
BY_HAND = "by hand"
"""Why a node was made that a person asked for. It joins the newest generation's comparison."""
Outcome = Literal["a", "b", "same", "bad"]
"""Which reply is better; `same`: neither, `bad`: neither, and both are bad."""


@checked
class Move:
    """What a node changes in its parent's recipe, or in the sliders that it carries."""

    kind: MoveKind
    model: Line | None = None
    """The model that is added, removed or weighted, or the new base."""
    value: Number | Line | None = None
    """The new weight of the model, or the new merge method."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Parameters of the new merge method."""
    profile: dict[str, Any] | None = None
    """The profile that the node carries, as in a profile's file; None takes the parent's away."""


@checked
class Gate:
    """What `steer eval --quick` said of a node, and whether people are shown its replies."""

    passed: Bool
    figures: dict[str, Number] = field(default_factory=dict)
    """The headline figure of each probe."""
    reasons: list[Line] = field(default_factory=list)
    """Why it did not pass, one line each."""


@checked
class Node:
    """One merge of a lineage."""

    id: Line
    """The number of its generation and a letter, such as `3b`."""
    move: Move
    why: Line
    """Who proposed the move, and for which reason."""
    recipe: dict[str, Any]
    """The mergekit recipe. Paths in it are absolute, or names of the hub."""
    parent: Line | None = None
    """Id of the node whose recipe this one changes; None for the start."""
    profile: dict[str, Any] | None = None
    """Sliders that are part of the node."""
    gate: Gate | None = None
    """The measurement against the start, which always passes; None for a start that was not measured."""
    inputs: dict[str, dict[str, Line]] = field(default_factory=dict)
    """sha256 of each file that the merge read, by model."""
    weights: dict[str, Line] = field(default_factory=dict)
    """sha256 of each file of weights. The recipe gives the same bytes again."""

    @property
    def passed(self) -> bool:
        """Whether people are shown its replies."""
        return self.gate is None or self.gate.passed


@checked
class Generation:
    """Merges that are judged together, as a rule children of one parent. Generation 0 is the start alone."""

    number: Count
    nodes: list[Node]


@checked
class Vote:
    """One choice between replies of two nodes to the same chat, made without seeing whose they are."""

    a: Line
    b: Line
    outcome: Outcome
    chat: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    """[role, text] of each message before the replies."""
    replies: Annotated[list[str], Field(min_length=2, max_length=2)]
    """The reply of `a`, then the reply of `b`."""
    left: Literal["a", "b"]
    """Which of the two was shown on the left."""
    voter: Line
    time: Number
    """Seconds since 1970."""


@checked
class Undo:
    """A voter takes a vote back. Its line stays in the file, and no longer counts."""

    undo: Number
    """The time of the vote."""
    time: Number


@checked
class Settings:
    """Settings of a whole lineage."""

    pool: list[Text]
    """Models that may be added, absolute paths or names of the hub."""
    children: Annotated[Count, Field(ge=1)] = 3
    """How many children a generation has."""
    seed: Count = 0
    written: dict[str, Line] = field(default_factory=dict)
    """How the start's recipe and the user wrote the model of each absolute path, for exported recipes."""


class Lineage:
    """A lineage, read from its directory at every call, since two people may work on it at once."""

    def __init__(self, place: str | Path) -> None:
        """Open the lineage in a directory. Errors: CheckpointError if there is none."""
        self.place = Path(place)
        _ = self.settings

    @classmethod
    def create(cls, place: str | Path, settings: Settings) -> Lineage:
        """Begin a lineage without generations."""
        write_atomic_json(Path(place) / SETTINGS, to_jsonable_python(settings))
        return cls(place)

    def admit(self, model: str, written: str) -> None:
        """Add a model, as the user wrote it, to the pool."""
        now = self.settings
        self.create(self.place, replace(now, pool=[*now.pool, model], written={model: written} | now.written))

    @property
    def settings(self) -> Settings:
        """Settings of the whole lineage."""
        file = self.place / SETTINGS
        raw = read_json_object(file, what="the settings of a lineage", do="start one with steer evolve START.yml")
        return from_file(Settings, raw, str(file))

    @property
    def generations(self) -> list[Generation]:
        """The generations that are whole, from the start on."""
        files = sorted((self.place / GENERATIONS).glob("[0-9]*.json"))
        what = "a generation of a lineage"
        return [
            from_file(Generation, read_json_object(f, what=what, do="restore it from a copy"), str(f)) for f in files
        ]

    @property
    def nodes(self) -> dict[str, Node]:
        """Every node by its id, in the order in which they were made."""
        return {node.id: node for generation in self.generations for node in generation.nodes}

    def node(self, name: str) -> Node:
        """Return the node of that id. Errors: UsageError, with the known ids."""
        nodes = self.nodes
        if name not in nodes:
            raise UsageError(f"{self.place}: expected a node, one of {', '.join(nodes)}, found {name!r}")
        return nodes[name]

    @property
    def newest(self) -> list[Node]:
        """The nodes of the newest generation that was proposed, and those that were made by hand since."""
        out: list[Node] = []
        for generation in reversed(self.generations):
            out = [*generation.nodes, *out]
            if any(node.why != BY_HAND for node in generation.nodes):
                break
        return out

    def write(self, generation: Generation) -> None:
        """Add a whole generation. A generation is never changed."""
        file = self.place / GENERATIONS / f"{generation.number:04}.json"
        if file.exists():
            raise UsageError(f"{file}: expected a new generation, found one of that number; run the command again")
        write_atomic_json(file, to_jsonable_python(generation))

    def model(self, node: str) -> Path:
        """Return where a node's merged checkpoint is, or would be."""
        return self.place / MODELS / node

    @property
    def votes(self) -> list[Vote]:
        """Every vote of everyone that was not taken back, in the order of time. A line that a crash cut off is left
        out."""
        files = sorted((self.place / VOTES).glob("*.jsonl"))
        return sorted((vote for file in files for vote in _votes(file, file.read_bytes())), key=lambda vote: vote.time)

    def vote(
        self, a: str, b: str, outcome: Outcome, *, chat: Sequence[tuple[str, str]], replies: Sequence[str],
        left: Literal["a", "b"], voter: str,
    ) -> Vote:  # fmt: skip
        """Keep a vote: it is on the disk when this returns. Each voter has a file.

        Errors: UsageError for a voter whose name cannot be a file's.
        """
        vote = Vote(a, b, outcome, [list(m) for m in chat], list(replies), left, voter, time.time())
        append_line(self._file_of(voter), _line(vote))
        return vote

    def undo(self, voter: str) -> Vote:
        """Take the voter's last vote back, and return it.

        Errors: UsageError for a voter without votes.
        """
        file = self._file_of(voter)
        votes = _votes(file, file.read_bytes()) if file.is_file() else []
        if not votes:
            raise UsageError(f"undo: expected a vote of {voter} to take back, found none")
        append_line(file, _line(Undo(votes[-1].time, time.time())))
        return votes[-1]

    def _file_of(self, voter: str) -> Path:
        check_name(voter, "--voter")
        return self.place / VOTES / f"{voter}.jsonl"


def ancestors(node: Node, nodes: Mapping[str, Node]) -> list[Node]:
    """Return a node, its parent, and so on to the start. `nodes`: those of the lineage, by id."""
    found = [node]
    while (parent := nodes.get(found[-1].parent or "")) and parent not in found:
        found.append(parent)
    return found


def _line(line: Vote | Undo) -> bytes:
    return json.dumps(to_jsonable_python(line)).encode()


def _votes(file: Path, data: bytes) -> list[Vote]:
    """The votes in the lines of a voter's file that were not taken back."""
    out: list[Vote] = []
    times: set[float] = set()
    for number, line in enumerate(
        data.split(b"\n")[:-1], 1
    ):  # what follows the last newline was not written to its end
        where = f"{file}: line {number}"
        try:
            raw = parse_json(line)
        except ValueError as e:
            raise CheckpointError(f"{where}: expected a vote, found no JSON ({e}); delete the line") from e
        if isinstance(raw, dict) and "undo" in raw:
            undone = from_file(Undo, raw, where).undo
            if undone not in times:  # two processes may take the same vote back
                raise CheckpointError(f"{where}: expected the time of a vote above, found {undone}; delete the line")
            out = [vote for vote in out if vote.time != undone]
        else:
            out.append(from_file(Vote, raw, where))
            times.add(out[-1].time)
    return out

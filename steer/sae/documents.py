"""Text as documents of token ids, from plain text, JSONL, chats, and anything that the `datasets` package resolves.

The first stage of `steer harvest` and of training from a model; `steer.sae.passes` runs the documents.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from jinja2 import TemplateError

from steer.core.lists import as_list
from steer.errors import SteerError, UsageError
from steer.files import one_line, parse_json
from steer.model.steered import SteeredModel
from steer.model.tokens import ids_of

TABLES = {".csv": "csv", ".parquet": "parquet"}
"""File suffix -> builder of `datasets` that reads such files."""
_TEXTS = 64
"""Number of texts per call of the tokenizer."""

Row = tuple[str, Any]
"""(position for error messages, such as file and line number; value of the row)."""


@dataclass(frozen=True)
class Document:
    """One sequence for the model."""

    ids: list[int]
    """Token ids, at most the context in length, with at most one BOS."""
    special: list[bool]
    """True for tokens that are not text: BOS, end tokens, and those a chat template puts around messages."""


def documents(model: SteeredModel, sources: str | Sequence[str], *, context: int = 512) -> Iterator[Document]:
    """Read sources one after another, lazily.

    A source is

    - a `.jsonl` or `.json` file (also `.gz`) with rows `{"text": ...}` or `{"messages": [...]}`; chats go through
      the chat template,
    - a `.csv` or `.parquet` file with a column `text` or `messages`,
    - any other file (also `.gz`): plain text; its passages, separated by blank lines, are packed up to `context`,
    - else `NAME[:CONFIG[:SPLIT[:COLUMN]]]`, a folder or id that `datasets.load_dataset` resolves, streamed.

    A text of more than `context` tokens becomes several documents. Errors: UsageError when a source does not exist,
    SteerError that names file and line for a row that cannot be read.

        for document in documents(model, "text.jsonl", context=256):
            print(len(document.ids))
    """
    if context < 2:
        raise UsageError(f"context: expected at least 2 tokens, found {context}")
    return chain.from_iterable(_Reader(model, context).read(s) for s in as_sources(sources))


def as_sources(sources: str | Sequence[str]) -> list[str]:
    """One source or several, as a list. Errors: UsageError for none."""
    found = [str(s) for s in as_list(sources)]
    if not found:
        raise UsageError("text: expected a file or a dataset id, found none")
    return found


def source_file(source: str) -> Path | None:
    """The path of a source that is a file; None for a folder or a dataset id. Errors: UsageError if it is missing."""
    path, folder = Path(source).expanduser(), Path(source.split(":")[0]).expanduser()
    if path.is_file():
        return path
    if not folder.is_dir() and (_kind(path) or source.startswith(("/", "./", "../", "~"))):
        raise UsageError(f"{source}: expected a file, found none; check the path")
    return None


class _Reader:
    """Turns the rows of a source into documents for one model."""

    def __init__(self, model: SteeredModel, context: int) -> None:
        # Beyond the model's context GPT-2 has no positions, and other models were not trained.
        self.model, self.context = model, min(context, model.context)
        self.tokenizer: Any = model.tokenizer
        # The tokens that the tokenizer puts before any text, such as BOS; there may be none.
        plain, framed = model.encode("a"), model.encode("a", frame=True)
        start = next((n for n in range(len(framed)) if framed[n : n + len(plain)] == plain), 0)
        self.prefix = framed[: min(start, self.context - 1)]
        added = self.tokenizer.added_tokens_decoder
        self.special = {*self.tokenizer.all_special_ids, *self.prefix} | {
            i for i, token in added.items() if token.special
        }
        if self.tokenizer.chat_template:
            # Some fine-tunes use added tokens in their chat template that are not marked as special.
            self.special |= {i for i in self._frame() if i in added}

    def read(self, source: str) -> Iterator[Document]:
        file = source_file(source)
        kind = _kind(file) if file else ""
        if file is None:
            name, config, split, column, *_ = [*source.split(":"), "", "", ""]
            yield from self._rows(_dataset(source, name, config or None, split or "train"), column)
        elif kind in (".json", ".jsonl"):
            yield from self._rows(_json_rows(file), "")
        elif kind in TABLES:
            yield from self._rows(_dataset(source, TABLES[kind], None, "train", data_files=str(file)), "")
        else:
            yield from self._packed(_passages(file))

    def _rows(self, rows: Iterable[Row], column: str) -> Iterator[Document]:
        # A text gets the tokenizer's prefix; a chat template has written it already.
        texts = ((self.prefix, v) if isinstance(v, str) else ([], self._chat(at, v)) for at, v in _values(rows, column))
        while group := list(islice(texts, _TEXTS)):
            for (prefix, _), ids in zip(group, self._encode([text for _, text in group]), strict=True):
                yield from self._cut(prefix + ids)

    def _chat(self, at: str, messages: list[Mapping[str, str]]) -> str:
        if not self.tokenizer.chat_template:
            raise SteerError(
                f"{at}: expected text, since {self.model.name} has no chat template, found a chat; "
                "copy chat_template.jinja from the tune it was made of"
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, KeyError, AttributeError) as e:
            raise SteerError(
                f"{at}: expected a chat that the template of {self.model.name} takes, found one it refuses: {e}"
            ) from e

    def _packed(self, passages: Iterator[str]) -> Iterator[Document]:
        held: list[int] = []
        room = self.context - len(self.prefix)
        while group := list(islice(passages, _TEXTS)):
            for ids in self._encode(group):
                if held and len(held) + len(ids) > room:
                    yield from self._cut(self.prefix + held)
                    held = []
                held += ids
        if held:
            yield from self._cut(self.prefix + held)

    def _cut(self, ids: list[int]) -> Iterator[Document]:
        """One document, or several if the ids are longer than the context; if the ids begin with the prefix, each
        does."""
        head = self.prefix if self.prefix and ids[: len(self.prefix)] == self.prefix else []
        body = ids[len(head) :]
        step = self.context - len(head)
        for start in range(0, len(body), step):
            part = [*head, *body[start : start + step]]
            yield Document(part, [i in self.special for i in part])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return ids_of(self.tokenizer, texts, self.model.vocabulary, self.model.name)

    def _frame(self) -> set[int]:
        """The token ids of a short chat in the model's chat template; empty if the template refuses it."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        try:
            return set(self._encode([self.tokenizer.apply_chat_template(chat, tokenize=False)])[0])
        except TemplateError:
            return set()


def _values(rows: Iterable[Row], column: str) -> Iterator[tuple[str, Any]]:
    """(position, text or chat) of each row; empty ones are skipped."""
    for at, row in rows:
        if not isinstance(row, Mapping):
            raise SteerError(f'{at}: expected an object with "text" or "messages", found {_shown(row)}')
        key = column or ("messages" if row.get("messages") is not None else "text")
        value = row.get(key)
        if value is None:
            expected = f'a column "{column}"' if column else '"text" or "messages"'
            raise SteerError(f"{at}: expected {expected}, found {', '.join(map(str, row)) or 'nothing'}")
        if isinstance(value, list):
            if not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in value):
                raise SteerError(f'{at}: expected messages with "role" and "content", found {_shown(value)}')
        elif not isinstance(value, str):
            raise SteerError(f'{at}: expected text or a list of messages in "{key}", found {_shown(value)}')
        if value:
            yield at, value


def _json_rows(file: Path) -> Iterator[Row]:
    """The rows of a JSONL file, or of a JSON file that holds one list."""
    with _opened(file) as f:
        if _kind(file) == ".json":
            text = f.read()
            if text.lstrip().startswith("["):
                yield from ((f"{file}, row {n}", row) for n, row in enumerate(_parsed(f"{file}", text), 1))
                return
            lines: Iterable[str] = text.splitlines()
        else:
            lines = f
        for n, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file}, line {n}", _parsed(f"{file}, line {n}", line)


def _parsed(at: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as e:
        raise SteerError(f"{at}: expected a JSON row, found {_shown(text.strip())} ({one_line(e)})") from e


def _passages(file: Path) -> Iterator[str]:
    """The passages of a text file, each with the blank line that ends it."""
    held: list[str] = []
    with _opened(file) as f:
        for line in f:
            if line.strip():
                held.append(line.rstrip("\n"))
            elif held:
                yield "\n".join(held) + "\n\n"
                held = []
    if held:
        yield "\n".join(held) + "\n\n"


class _opened:
    """Context manager: open a text file, decompressed if it is `.gz`. Read errors become a SteerError that names it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> TextIO:
        opener: Callable[..., Any] = gzip.open if self.file.suffix.lower() == ".gz" else open
        try:
            self.stream = opener(self.file, "rt", encoding="utf-8")
        except OSError as e:
            raise SteerError(f"{self.file}: could not be read, {e.strerror}; check its permissions") from e
        return self.stream

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.stream.close()
        if isinstance(error, UnicodeDecodeError):
            raise SteerError(f"{self.file}: expected text in UTF-8, found other bytes; convert it") from error
        if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)):
            raise SteerError(f"{self.file}: expected a whole gzip file, found a broken one; copy it again") from error


def _dataset(source: str, name: str, config: str | None, split: str, **kwargs: Any) -> Iterator[Row]:
    """The rows of a dataset, streamed."""
    import datasets  # here, as it is slow to import and rarely needed

    try:
        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True, **kwargs))
        for n in range(1, 1 << 62):
            row = next(rows, None)
            if row is None:
                return
            yield f"{source}, row {n}", row
    except Exception as e:  # datasets passes on any error of its readers
        raise SteerError(
            f"{source}: expected a file, or a dataset that `datasets` can load, found "
            f"{type(e).__name__}: {' '.join(str(e).split())[:200]}; check the name"
        ) from e


def _kind(path: Path) -> str:
    """The type of a file by its name: `.jsonl` for `a.jsonl.gz`; "" for an unknown suffix."""
    kind = path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    return kind if kind in (".json", ".jsonl", ".txt", ".md", *TABLES) else ""


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= 60 else text[:57] + "...")

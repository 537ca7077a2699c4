"""Text as documents of token ids, from plain text, JSONL, chats, and anything that the `datasets` package resolves.

The first stage of `steer harvest` and of training from a model; `steer.sae.passes` runs the documents.
"""

from __future__ import annotations

import gzip
import logging
import operator
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from steer.core.lists import as_list
from steer.core.small_files import shown
from steer.errors import SteerError, UsageError
from steer.files import one_line, parse_json
from steer.model.steered import SteeredModel
from steer.model.tokens import ids_of

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

    - a `.jsonl` or `.json` file with rows `{"text": ...}` or `{"messages": [...]}`; chats go through the chat template,
    - a `.csv` or `.parquet` file with a column `text` or `messages`,
    - any other file: plain text; its passages, separated by blank lines, are packed up to `context`,
    - else `NAME[:CONFIG[:SPLIT[:COLUMN]]]`, a folder or id that `datasets.load_dataset` resolves, streamed.

    Files may be compressed (`.gz`). A text of more than `context` tokens becomes several documents. Errors: UsageError
    when a source does not exist, SteerError that names file and line for a row that cannot be read.

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
    known = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".md")
    if not folder.is_dir() and (_suffix(path) in known or source.startswith(("/", "./", "../", "~"))):
        raise UsageError(f"{source}: expected a file, found none; check the path")
    return None


class _Reader:
    """Turns the rows of a source into documents for one model."""

    def __init__(self, model: SteeredModel, context: int) -> None:
        # Beyond the model's context GPT-2 has no positions, and other models were not trained; a document beyond the
        # rotary limit would change the frequencies of the others in its batch.
        limits = (context, model.context, model.anatomy.rotary_limit)
        self.model, self.context = model, min(limit for limit in limits if limit is not None)
        self.tokenizer: Any = model.tokenizer
        self.prefix = list(model.frame)[: self.context - 1]
        added = self.tokenizer.added_tokens_decoder
        self.special = {*self.tokenizer.all_special_ids, *self.prefix, *(i for i, t in added.items() if t.special)}
        if self.tokenizer.chat_template:
            # Some fine-tunes use added tokens in their chat template that are not marked as special.
            chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            with suppress(UsageError):  # the template refuses such a chat
                (ids,) = self._encode([model.template.whole(chat)])
                self.special |= {i for i in ids if i in added}

    def read(self, source: str) -> Iterator[Document]:
        file = source_file(source)
        if file is None:
            name, config, split, column, *_ = [*source.split(":"), "", "", ""]
            rows = _streamed(source, "load_dataset", name, config or None, split=split or "train")
            return self._rows(_numbered(source, rows), column)
        suffix = _suffix(file)
        if suffix in (".json", ".jsonl"):
            return self._rows(_json_rows(file), "")
        if suffix in (".csv", ".parquet"):
            return self._rows(_numbered(source, _streamed_file(file, suffix[1:])), "")
        return self._packed(_passages(file))

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
            return self.model.template.whole(messages)
        except UsageError as e:
            raise SteerError(f"{at}: expected a chat that the chat template takes, found another: {e}") from e

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


def _values(rows: Iterable[Row], column: str) -> Iterator[Row]:
    """(position, text or chat) of each row; empty ones are skipped."""
    for at, row in rows:
        if not isinstance(row, Mapping):
            raise SteerError(f'{at}: expected an object with "text" or "messages", found {shown(row)}')
        key = column or ("messages" if row.get("messages") is not None else "text")
        value = row.get(key)
        if value is None:
            expected = f'a column "{column}"' if column else '"text" or "messages"'
            raise SteerError(f"{at}: expected {expected}, found {', '.join(map(str, row)) or 'nothing'}")
        if isinstance(value, list):
            if not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in value):
                raise SteerError(f'{at}: expected messages with "role" and "content", found {shown(value)}')
        elif not isinstance(value, str):
            raise SteerError(f'{at}: expected text or a list of messages in "{key}", found {shown(value)}')
        if value:
            yield at, value


def _json_rows(file: Path) -> Iterator[Row]:
    """The rows of a JSONL file, or of a JSON file that holds one list.

    `datasets` opens the file and splits it into lines. Its own JSON reader names no lines, and wants every 10 MB of a
    file to have the same columns.
    """
    lines: Iterable[str] = (row["text"] for row in _streamed_file(file, "text"))
    if _suffix(file) == ".json":
        lines = list(lines)
        text = "\n".join(lines).lstrip()
        if text.startswith("["):
            yield from _numbered(str(file), _parsed(str(file), text))
            return
    for n, line in enumerate(lines, 1):
        if line.strip():
            yield f"{file}, line {n}", _parsed(f"{file}, line {n}", line)


def _parsed(at: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as e:
        raise SteerError(f"{at}: expected a JSON row, found {shown(text.strip())} ({one_line(e)})") from e


def _passages(file: Path) -> Iterator[str]:
    """The passages of a text file, each with the blank line that ends it."""
    lines = (row["text"] for row in _streamed_file(file, "text"))
    return ("\n".join(held) + "\n\n" for blank, held in groupby(lines, lambda line: not line.strip()) if not blank)


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[Row]:
    return ((f"{source}, row {n}", row) for n, row in enumerate(rows, 1))


def _streamed_file(file: Path, kind: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a file that may be compressed; `kind` is text (a row is a line), csv or parquet."""
    # Not by `load_dataset`, which counts its calls on a server.
    with TemporaryDirectory() as cache:  # gets a lock file, nothing else
        # A link, since `datasets` reads the name of a file as a pattern or a URL.
        link = Path(cache, "rows.gz" if file.suffix.lower() == ".gz" else "rows")
        link.symlink_to(file.resolve())
        yield from _streamed(str(file), f"Dataset.from_{kind}", str(link), cache_dir=cache)


def _streamed(source: str, reader: str, *args: Any, **kwargs: Any) -> Iterator[Mapping[str, Any]]:
    """The rows that a reader of `datasets` returns. Errors: SteerError of one line that names the source."""
    import datasets  # here, as it is slow to import

    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs an error before it raises the same
    try:
        yield from operator.attrgetter(reader)(datasets)(*args, streaming=True, **kwargs)
    except UnicodeDecodeError as e:
        raise SteerError(f"{source}: expected text in UTF-8, found other bytes; convert it") from e
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise SteerError(f"{source}: expected a whole gzip file, found a broken one; copy it again") from e
    except PermissionError as e:
        raise SteerError(f"{source}: could not be read, {e.strerror}; check its permissions") from e
    except Exception as e:  # datasets passes on any error of its readers
        raise SteerError(
            f"{source}: expected a file, or a dataset that `datasets` can load, found {type(e).__name__}: "
            f"{one_line(e)}; check the name"
        ) from e


def _suffix(path: Path) -> str:
    """The suffix of a file's name in lower case, without `.gz`: `.jsonl` for `a.jsonl.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix

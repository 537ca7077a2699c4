"""Text, JSONL, chats and datasets become documents of token ids, and bad rows are named."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_chat import save_tiny_chat
from tokenizers import processors

from steer.errors import SteerError, UsageError
from steer.model.steered import SteeredModel, load
from steer.sae.documents import Document, documents

CHAT = {"messages": [{"role": "user", "content": "hello friend"}, {"role": "assistant", "content": "well lie"}]}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("documents") / "chat"))


@pytest.fixture
def with_bos(model: SteeredModel, tiny_llama: Callable[..., Path], tmp_path: Path) -> SteeredModel:
    """A tokenizer that puts BOS before a text and EOS behind it."""
    made = load(save_tiny_chat(tiny_llama, tmp_path / "bos"))
    made.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert made.tokenizer("ba").input_ids[0] == 1
    return made


def words(model: SteeredModel, document: Document) -> str:
    return model.tokenizer.decode([i for i, s in zip(document.ids, document.special, strict=True) if not s])


def rows(path: Path, *values: object) -> str:
    text = "".join(json.dumps(v) + "\n" for v in values)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_rows_of_text_and_of_messages_stand_in_one_file(model: SteeredModel, tmp_path: Path, name: str) -> None:
    text, chat = documents(model, rows(tmp_path / name, {"text": "ba be"}, CHAT))
    assert words(model, text) == "ba be"
    assert words(model, chat) == "hello friend well lie"


def test_a_json_list_is_rows_too(model: SteeredModel, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "ba"}, {"text": "be"}], indent=1))
    assert [words(model, d) for d in documents(model, str(tmp_path / "a.json"))] == ["ba", "be"]


def test_a_chat_has_one_bos_and_its_frame_is_special(with_bos: SteeredModel, tmp_path: Path) -> None:
    (chat,) = documents(with_bos, rows(tmp_path / "a.jsonl", CHAT))
    assert chat.ids.count(1) == 1
    frame = {t for t, s in zip(with_bos.tokenizer.convert_ids_to_tokens(chat.ids), chat.special, strict=True) if s}
    assert frame == {"<s>", "</s>", "<|user|>", "<|assistant|>"}


def test_a_text_begins_as_the_tokenizer_begins_it_every_piece_of_it(with_bos: SteeredModel, tmp_path: Path) -> None:
    pieces = list(documents(with_bos, rows(tmp_path / "a.jsonl", {"text": "ba be bi bo bu"}), context=3))
    assert [p.ids[0] for p in pieces] == [1, 1, 1]
    assert [p.special for p in pieces] == [[True, False, False], [True, False, False], [True, False]]
    assert " ".join(words(with_bos, p) for p in pieces) == "ba be bi bo bu"


def test_passages_of_plain_text_are_packed_up_to_the_context_and_no_word_is_lost(
    model: SteeredModel, tmp_path: Path
) -> None:
    passages = ["ba be bi", "bo\nbu", "da de di do du fa fe", "fi"]
    (tmp_path / "a.txt").write_text("\n\n".join(passages))
    made = list(documents(model, str(tmp_path / "a.txt"), context=5))
    assert [words(model, d) for d in made] == ["ba be bi bo bu", "da de di do du", "fa fe", "fi"]


def test_sources_are_read_one_after_another(model: SteeredModel, tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("be")
    sources = [rows(tmp_path / "a.jsonl", {"text": "ba"}), str(tmp_path / "b.md")]
    assert [words(model, d) for d in documents(model, sources)] == ["ba", "be"]


def test_the_datasets_package_reads_folders_and_tables(model: SteeredModel, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    rows(tmp_path / "folder" / "train.jsonl", {"text": "ba", "title": "be"}, {"text": "bi", "title": "bo"})
    assert [words(model, d) for d in documents(model, str(tmp_path / "folder"))] == ["ba", "bi"]
    assert [words(model, d) for d in documents(model, f"{tmp_path / 'folder'}::train:title")] == ["be", "bo"]
    with open(tmp_path / "a.csv", "w", newline="") as f:
        csv.writer(f).writerows([["text"], ["bu"]])
    assert [words(model, d) for d in documents(model, str(tmp_path / "a.csv"))] == ["bu"]


def test_tables_may_be_compressed_and_a_name_is_no_pattern(model: SteeredModel, tmp_path: Path) -> None:
    (tmp_path / "a[1].csv.gz").write_bytes(gzip.compress(b"text\nba\n"))
    (tmp_path / "b*.txt").write_text("be")
    sources = [str(tmp_path / "a[1].csv.gz"), str(tmp_path / "b*.txt")]
    assert [words(model, d) for d in documents(model, sources)] == ["ba", "be"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{oops", "line 2: expected a JSON row"),
        ('["ba"]', 'line 2: expected an object with "text" or "messages"'),
        ('{"body": "ba"}', 'line 2: expected "text" or "messages", found body'),
        ('{"text": 3}', 'line 2: expected text or a list of messages in "text", found'),
        ('{"messages": [{"role": "user"}]}', 'line 2: expected messages with "role" and "content"'),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(model: SteeredModel, tmp_path: Path, line: str, found: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "ba"}\n' + line + "\n")
    with pytest.raises(SteerError) as e:
        list(documents(model, str(file)))
    assert str(e.value).startswith(f"{file}, {found}")
    assert "\n" not in str(e.value)


def test_broken_files_and_unknown_sources_are_one_line(model: SteeredModel, tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "ba"}\n' * 2000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "no.jsonl.gz").write_bytes(b'{"text": "ba"}')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ba")
    for name, found in [("cut.jsonl.gz", "gzip"), ("no.jsonl.gz", "gzip"), ("latin.txt", "UTF-8")]:
        with pytest.raises(SteerError, match=found) as e:
            list(documents(model, str(tmp_path / name)))
        assert str(tmp_path / name) in str(e.value)
    with pytest.raises(UsageError, match="expected a file, found none"):
        list(documents(model, "nowhere.jsonl"))
    with pytest.raises(SteerError, match="expected a file, or a dataset") as e:
        list(documents(model, "nobody/nothing-at-all"))
    assert "\n" not in str(e.value)


def test_a_chat_needs_a_template(model: SteeredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(SteerError, match=r"line 1: expected text, since .* has no chat template"):
        list(documents(model, rows(tmp_path / "a.jsonl", CHAT)))

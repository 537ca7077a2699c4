"""Text of replies: whole characters, no part of a stop string, tokens beside their text."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tiny_chat import save_tiny_chat
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steer.serve.engine import Token
from steer.serve.openai_json import token_bytes
from steer.serve.writing import Piece, ReplyText, begun, find_stop


def token(i: int, end: bool = False) -> Token:
    return Token(i, None, (), end)


@pytest.fixture(scope="module")
def by_bytes(tiny_llama, tmp_path_factory) -> Any:
    """Every token is a byte."""
    return AutoTokenizer.from_pretrained(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("t") / "b", by_bytes=True))


@pytest.fixture(scope="module")
def by_words(tiny_llama, tmp_path_factory) -> Any:
    return AutoTokenizer.from_pretrained(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("t") / "w"))


def pieces(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = (), prompt: tuple[int, ...] = ()) -> list[Piece]:
    text = ReplyText(tokenizer, prompt, stop)
    return [*(text.add(token(i)) for i in ids), text.end()]


def said(made: list[Piece]) -> str:
    return "".join(p.text for p in made)


def test_pieces_hold_whole_characters_and_make_up_the_text(by_bytes):
    text = "Zoë 👩‍👩‍👧 naïve — ﬁ 日本\u2028語"
    ids = by_bytes(text, add_special_tokens=False).input_ids
    made = pieces(by_bytes, ids)
    assert said(made) == text
    assert [p.text for p in made if p.text] == list(text)
    assert len(ids) > len(text)


def test_any_bytes_read_as_the_tokenizer_reads_them_together(by_bytes):
    chance = random.Random(0)
    known = by_bytes("aé日👧\n ", add_special_tokens=False).input_ids
    for _ in range(300):
        ids = [chance.choice([*known, chance.randrange(len(by_bytes))]) for _ in range(chance.randrange(1, 25))]
        assert said(pieces(by_bytes, ids)) == by_bytes.decode(ids, skip_special_tokens=True), ids


def test_a_reply_goes_on_from_the_middle_of_its_prompt(by_words):
    prompt, reply = by_words("hello friend").input_ids, by_words("well yes").input_ids
    # These words are joined by spaces, one of which belongs to the reply's first word.
    assert said(pieces(by_words, reply, prompt=tuple(prompt))) == " well yes"


def test_end_and_special_tokens_are_no_text(by_words):
    text = ReplyText(by_words, ())
    assert said([text.add(token(i)) for i in by_words("well yes").input_ids]) == "well yes"
    assert text.add(token(2, end=True)) == Piece("")
    assert said(pieces(by_words, [4, *by_words("well").input_ids, 5])) == "well"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("\nYou:",), "He nods. You"),
        (("nods",), "He "),
        (("H",), ""),
        ((". You\n", "He nods. You\nYou:!"), "He nods"),
        (("nowhere",), "He nods. You\nYou: go"),
        (("go", "You"), "He nods. "),
        (("go!",), "He nods. You\nYou: go"),
        (("\n\nYou",), "He nods. You\nYou: go"),
        (("👧", "ou\nYou: g"), "He nods. Y"),
    ],
)
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_ever_sent(by_bytes, stop, expected):
    ids = by_bytes("He nods. You\nYou: go", add_special_tokens=False).input_ids
    made = pieces(by_bytes, ids, stop)
    assert said(made) == expected
    so_far = ""
    for piece in made:
        so_far += piece.text
        assert expected.startswith(so_far)
    assert not any(s in so_far for s in stop)


def test_only_what_may_become_a_stop_string_is_held_back(by_bytes):
    ids = by_bytes("ab<x<STOP", add_special_tokens=False).input_ids
    made = [p.text for p in pieces(by_bytes, ids, ("<STOP",))]
    assert made == ["a", "b", "", "<x", "", "", "", "", "", ""]


def test_a_stop_string_of_several_characters_within_one_token(by_words):
    assert said(pieces(by_words, by_words("well yes friend").input_ids, ("ie",))) == "well yes fr"


def test_nothing_comes_after_a_stop_string(by_words):
    text = ReplyText(by_words, (), ("yes",))
    ids = by_words("well yes friend").input_ids
    assert said([text.add(token(i)) for i in ids]) == "well "
    assert text.stopped
    assert text.end() == Piece("")


def test_tokens_come_with_the_text_that_they_begin_in(by_bytes):
    ids = by_bytes("aé b", add_special_tokens=False).input_ids
    made = pieces(by_bytes, ids, ("b!",))
    texts = [(p.text, [(t.token.id, t.start) for t in p.tokens]) for p in made if p.text]
    a, e1, e2, space, b = ids
    assert texts == [("a", [(a, 0)]), ("é", [(e1, 1), (e2, 1)]), (" ", [(space, 2)]), ("b", [(b, 3)])]


def test_tokens_of_a_stop_string_are_left_out(by_bytes):
    ids = by_bytes("ab\nYou", add_special_tokens=False).input_ids
    assert [t.token.id for p in pieces(by_bytes, ids, ("\nYo",)) for t in p.tokens] == ids[:2]


def test_an_unfinished_character_at_the_end_is_reported_with_its_tokens(by_bytes):
    ids = by_bytes("a日", add_special_tokens=False).input_ids[:-1]
    made = pieces(by_bytes, ids)
    assert said(made) == "a\ufffd"
    assert [t.token.id for t in made[-1].tokens] == ids[1:]


@pytest.mark.parametrize(("text", "stop", "at"), [("abc", ["c", "bc"], 1), ("abc", ["x"], None), ("abc", [], None)])
def test_find_stop_is_where_the_first_begins(text, stop, at):
    assert find_stop(text, stop) == at


@pytest.mark.parametrize(
    ("text", "stop", "n"), [("ab", ["bc"], 1), ("aab", ["aabaab"], 3), ("ab", ["ab"], 0), ("", ["a"], 0)]
)
def test_begun_is_the_longest_beginning_of_a_stop_string(text, stop, n):
    assert begun(text, stop) == n


def test_bytes_of_tokens_make_up_the_text(by_bytes, by_words):
    text = "Zoë 👧\n"
    ids = by_bytes(text, add_special_tokens=False).input_ids
    assert b"".join(token_bytes(by_bytes, i) for i in ids) == text.encode()
    assert token_bytes(by_words, by_words("hello").input_ids[0]) == b"hello"
    assert token_bytes(by_bytes, by_bytes.eos_token_id) == b"</s>"
    assert token_bytes(by_bytes, 10_000) == b""


@pytest.fixture(scope="module")
def by_fallback() -> Any:
    """As sentencepiece has it: words with their space, and bytes for what is in no word."""
    vocab = {"<unk>": 0, "\u2581hello": 1, "\u2581yes": 2, "é": 3} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    own = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    own.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=own)


def test_a_vocabulary_with_byte_fallback(by_fallback):
    sun = [4 + b for b in "日".encode()]
    assert [token_bytes(by_fallback, i) for i in (1, sun[0], 3)] == [b" hello", "日".encode()[:1], "é".encode()]
    assert [p.text for p in pieces(by_fallback, [1, *sun, 3, 2])] == ["hello", "", "", "日", "é", " yes", ""]
    assert said(pieces(by_fallback, [2, *sun], prompt=(1,))) == " yes日"


def test_bytes_that_are_no_utf8_break_nothing(by_fallback):
    chance = random.Random(0)
    for _ in range(300):
        ids = [chance.choice([1, 2, 3, 4 + 0xE6, 4 + 0x97, 4 + 0xA5, 4 + 0x41]) for _ in range(12)]
        text = said(pieces(by_fallback, ids, prompt=tuple(reversed(ids))))
        assert text.count("hello") == ids.count(1)
        assert text.count("yes") == ids.count(2)

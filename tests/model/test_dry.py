"""DRY: the fast bookkeeping is the definition, in linear time, with breakers as tokenizers write them."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steer.core.sampler import Sampler
from steer.model.sampling import Draw, Repeats, breaker_ids, choose, common_prefixes
from steer.model.steered import SteeredModel


def by_definition(text, breakers, reach, shortest):
    """{token: longest match that it followed}, by comparing the text's end with the end of every beginning."""
    text = text[-reach:] if reach else text
    found = {}
    for end in range(1, len(text)):
        length = 0
        while length < end and text[end - 1 - length] == text[-1 - length] and text[-1 - length] not in breakers:
            length += 1
        if length >= max(shortest, 1) and text[end] not in breakers:
            found[text[end]] = max(found.get(text[end], 0), length)
    return found


@pytest.mark.parametrize("reach", [0, 1, 5, 12])
@pytest.mark.parametrize("breakers", [frozenset(), frozenset([0]), frozenset([0, 2])], ids=len)
def test_matches_are_those_of_the_definition_whether_read_or_written(reach, breakers):
    dice = random.Random(reach)
    seen = 0
    for _ in range(60):
        text = [dice.randrange(dice.choice([2, 4])) for _ in range(dice.randrange(1, 40))]
        cut = dice.randrange(1, len(text) + 1)
        written = Repeats(text[:cut], breakers, reach)
        for token in text[cut:]:
            written.append(token)
        read = Repeats(text, breakers, reach)
        for shortest in (0, 1, 2, 4):
            expected = by_definition(text, breakers, reach, shortest)
            assert written.continuations(shortest) == read.continuations(shortest) == expected
            seen += len(expected)
    assert seen > 20 or reach == 1


def test_no_repeat_reaches_across_a_breaker_and_no_breaker_is_penalised():
    text = [5, 6, 7, 8, 1, 5, 6, 7]
    assert Repeats(text, frozenset()).continuations() == {8: 3}
    assert Repeats(text, frozenset([6])).continuations() == {8: 1}
    assert Repeats(text, frozenset([7])).continuations() == {}
    assert Repeats(text, frozenset([8])).continuations() == {}


def test_the_penalty_is_the_published_formula_and_stays_finite():
    sampler = Sampler(dry_multiplier=0.8, dry_base=1.75, dry_allowed_length=2)
    for n in (2, 3, 10):
        text = [*range(n), 99, 98, *range(n)]
        assert Repeats(text, frozenset()).penalties(sampler) == {99: pytest.approx(0.8 * 1.75 ** (n - 2))}
    assert Repeats([0, 99, 98, 0], frozenset()).penalties(sampler) == {}
    hopeless = Repeats([1] * 5000, frozenset()).penalties(sampler)[1]
    assert 1e20 < hopeless < torch.finfo(torch.float32).max


class Watched(list):
    """A list that counts how often it is looked at."""

    looks = 0

    def __getitem__(self, i):
        Watched.looks += 1
        return super().__getitem__(i)


@pytest.mark.parametrize("period", [1, 2, 7, 4000])
def test_reading_a_prompt_is_linear_however_it_repeats(period):
    Watched.looks = 0
    text = Watched(i % period for i in range(4000))
    lengths = common_prefixes(text)
    assert Watched.looks <= 4 * len(text)
    assert lengths[0] == 4000
    assert all(n == (4000 - i if i % period == 0 else 0) for i, n in enumerate(lengths))


@pytest.fixture
def byte_pairs():
    """A tokenizer of bytes that also has a full stop with a quote, two line ends, and "no"."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(".", '"'), ("\u010a", "\u010a"), ("n", "o")]
    vocabulary = {w: i for i, w in enumerate([*words, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_breakers_are_the_tokens_that_hold_them(byte_pairs):
    names = {'"', '."', "\u010a", "\u010a\u010a"}
    assert breaker_ids(byte_pairs, ('"', "\n")) == frozenset(byte_pairs.convert_tokens_to_ids(sorted(names)))
    assert breaker_ids(byte_pairs, ()) == frozenset()
    # Of a breaker of several tokens the last one breaks, as the definition has it.
    assert breaker_ids(byte_pairs, ("User:",)) == {byte_pairs.convert_tokens_to_ids(":")}
    assert breaker_ids(byte_pairs, ('"', "\n")) is breaker_ids(byte_pairs, ('"', "\n"))


def test_a_breaker_that_the_tokenizer_cannot_write_breaks_nothing():
    # It splits at white space, so "a" and a line end is "a"; "a:" is a word that it does not know.
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "hello": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert breaker_ids(tokenizer, ("\n",)) == breaker_ids(tokenizer, (":",)) == frozenset()


def test_a_greedy_reply_that_loops_stops_looping(model: SteeredModel):
    def reply(**dry):
        draw = Draw(Sampler(temperature=0, repetition_penalty=1.0, **dry), [1, 4, 20, 33, 5], 0, model.tokenizer)
        text = [1, 4, 20, 33, 5]
        with torch.inference_mode():
            for _ in range(80):
                text += choose(model.hf(input_ids=torch.tensor([text])).logits[:, -1], [draw])
        return text[5:]

    def longest_repeat(text):
        return max(max(Repeats(text[:n], frozenset()).continuations().values(), default=0) for n in range(1, len(text)))

    assert longest_repeat(reply()) > 20
    assert longest_repeat(reply(dry_multiplier=5.0)) < 8

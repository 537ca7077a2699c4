"""Each processor does what its definition says, in the order asked for, and rows do not touch each other."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessorList
from transformers.generation import logits_process as hf

from steer.core.sampler import MEASURE, ORDER, PRESETS, TEMPERATURE_LAST, Sampler
from steer.errors import UsageError
from steer.model.sampling import Draw, choose, logprobs, process

OFF = Sampler(temperature=1.0, repetition_penalty=1.0)
P = [0.05, 0.4, 0.1, 0.3, 0.15]
"""Probabilities of five tokens; the logits are their logarithms and a constant."""
LOGITS = torch.tensor([P]).log() + 3.0


@pytest.fixture(scope="module")
def tokenizer(chat_checkpoint):
    return AutoTokenizer.from_pretrained(chat_checkpoint)


@pytest.fixture
def row(tokenizer):
    """`row(sampler, prompt, reply, key)`: a text with a reply so far."""

    def make(sampler=OFF, prompt=(0,), reply=(), key=0):
        made = Draw(sampler, list(prompt), key, tokenizer)
        for token in reply:
            made.append(token)
        return made

    return make


@pytest.fixture
def processed(row):
    """`processed(sampler, prompt, reply, logits)`: scores of all tokens after every stage, -inf for dropped ones."""

    def make(sampler, prompt=(0,), reply=(), logits=LOGITS):
        rows = [row(sampler, prompt, reply, key) for key in range(len(logits))]
        scores, tokens = process(logits, sampler, rows)
        return scores if tokens is None else torch.full_like(logits, -torch.inf).scatter(1, tokens, scores)

    return make


@pytest.fixture
def distribution(processed):
    """`distribution(...)`: {token: probability} of what is left in the first row."""

    def make(*args, **kwargs):
        p = processed(*args, **kwargs).softmax(-1)[0]
        return {i: float(p[i]) for i in range(len(p)) if p[i] > 0}

    return make


def renormalised(*kept):
    return pytest.approx({i: P[i] / sum(P[j] for j in kept) for i in kept}, rel=1e-5)


# Each processor


def test_nothing_on_is_the_model_itself(processed):
    assert torch.equal(processed(OFF), LOGITS)


def test_temperature_raises_probabilities_to_its_inverse(distribution):
    powers = [p**0.5 for p in P]
    assert distribution(replace(OFF, temperature=2.0)) == pytest.approx(
        {i: q / sum(powers) for i, q in enumerate(powers)}, rel=1e-5
    )


@pytest.mark.parametrize(("k", "kept"), [(1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4]), (5, range(5)), (9, range(5))])
def test_top_k_keeps_the_k_likeliest(distribution, k, kept):
    assert distribution(replace(OFF, top_k=k)) == renormalised(*kept)


@pytest.mark.parametrize(("p", "kept"), [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.71, [1, 3, 4]), (0.99, range(5))])
def test_top_p_keeps_the_fewest_that_reach_p(distribution, p, kept):
    assert distribution(replace(OFF, top_p=p)) == renormalised(*kept)


@pytest.mark.parametrize(("p", "kept"), [(0.1, range(5)), (0.26, [1, 3, 4]), (0.7, [1, 3]), (0.8, [1]), (1.0, [1])])
def test_min_p_drops_what_is_below_its_share_of_the_likeliest(distribution, p, kept):
    assert distribution(replace(OFF, min_p=p)) == renormalised(*kept)


def test_typical_p_keeps_the_tokens_nearest_to_the_entropy_that_reach_p(distribution):
    # Entropy 1.393 nats; distances of the surprise from it: .477 (.4), .189 (.3), .504 (.15), .910 (.1), 1.603 (.05).
    kept = {0.2: [3], 0.5: [1, 3], 0.69: [1, 3], 0.71: [1, 3, 4], 0.9: [1, 2, 3, 4]}
    for p, tokens in kept.items():
        assert distribution(replace(OFF, typical_p=p)) == renormalised(*tokens)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_reply(processed):
    logits = torch.tensor([[2.0, -1.0, 0.5, -3.0, 4.0]])
    scores = processed(replace(OFF, repetition_penalty=2.0), [0, 1, 1], [4, 4, 0], logits)
    assert scores.tolist() == [[1.0, -2.0, 0.5, -3.0, 2.0]]


def test_frequency_and_presence_penalties_count_the_reply_alone(processed):
    # mu[j] - c[j] * frequency - (c[j] > 0) * presence, c[j] counting sampled tokens.
    logits = torch.tensor([[2.0, -1.0, 0.5, -3.0, 4.0]])
    sampler = replace(OFF, frequency_penalty=0.5, presence_penalty=0.25)
    assert processed(sampler, [0, 1, 1], [1, 4, 4, 4], logits).tolist() == [[2.0, -1.75, 0.5, -3.0, 2.25]]
    assert processed(replace(sampler, presence_penalty=0.0), [0], [1, 4, 4], logits)[0, 4] == 3.0
    assert processed(replace(sampler, frequency_penalty=-2.0), [0], [4, 4], logits)[0, 4] == 7.75


def test_additive_penalties_come_after_the_repetition_penalty(processed):
    sampler = replace(OFF, repetition_penalty=2.0, presence_penalty=1.0)
    assert processed(sampler, [0], [1], torch.tensor([[6.0, 4.0]])).tolist() == [[3.0, 1.0]]


def test_tokens_of_a_prompt_that_belong_to_the_reply_count_as_replied(tokenizer, row):
    sampler = replace(OFF, frequency_penalty=1.0, seed=4)
    begun = Draw(sampler, [0, 3, 3, 1], 0, tokenizer, begun=2)
    assert process(LOGITS, sampler, [begun])[0].equal(process(LOGITS, sampler, [row(sampler, [0, 3], [3, 1])])[0])


def test_a_logit_bias_is_added_and_bans_or_forces_at_its_ends(processed, distribution):
    scores = processed(replace(OFF, logit_bias=((3, -1.5), (0, 2.0))))
    torch.testing.assert_close(scores - LOGITS, torch.tensor([[2.0, 0, 0, -1.5, 0]]))
    banned = replace(OFF, logit_bias=((1, -100), (3, -100)))
    for sampler in (banned, replace(banned, temperature=80.0), replace(banned, min_p=0.5, order=TEMPERATURE_LAST)):
        assert not {1, 3} & set(distribution(sampler))
    forced = replace(OFF, logit_bias=((0, 100),), repetition_penalty=1.1)
    for sampler in (
        forced,
        replace(forced, temperature=3.0),
        replace(forced, xtc_probability=1.0),
        replace(forced, typical_p=0.5),
    ):
        assert distribution(sampler, [0], [0, 0])[0] > 1 - 1e-9


def test_a_logit_bias_out_of_the_vocabulary_is_refused_before_anything_is_drawn(tokenizer, row, processed):
    with pytest.raises(
        UsageError, match=f"logit_bias: expected token ids below {len(tokenizer)}.*found {len(tokenizer)}"
    ):
        row(replace(OFF, logit_bias=((len(tokenizer), 1.0),)))
    # A token that the tokenizer has and the model does not write changes nothing.
    assert torch.equal(processed(replace(OFF, logit_bias=((len(tokenizer) - 1, 9.0),))), LOGITS)


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(UsageError, match="prompt: expected at least one token"):
        Draw(OFF, [], 0, tokenizer)


def test_xtc_drops_all_top_choices_but_the_least_likely(distribution):
    always = replace(OFF, xtc_probability=1.0, xtc_threshold=0.12)
    assert distribution(always) == renormalised(0, 2, 4)
    assert distribution(replace(always, xtc_threshold=0.35)) == renormalised(*range(5))
    assert distribution(replace(always, xtc_threshold=0.9)) == renormalised(*range(5))
    # What another stage has dropped is no top choice, not even at threshold 0.
    assert distribution(replace(always, top_k=2, xtc_threshold=0.0)) == renormalised(3)
    assert distribution(replace(always, min_p=0.7, xtc_threshold=0.0)) == renormalised(3)
    # Of equally likely ones a single one stays.
    assert len(distribution(replace(always, xtc_threshold=0.2), logits=torch.zeros(1, 4))) == 1


def test_xtc_acts_as_often_as_it_says_and_row_by_row(processed):
    share, rows = 0.25, 4000
    scores = processed(replace(OFF, xtc_probability=share, xtc_threshold=0.12), logits=LOGITS.repeat(rows, 1))
    acted = scores[:, 1].isinf()
    assert torch.equal(acted, scores[:, 3].isinf())
    assert abs(float(acted.float().mean()) - share) < 4 * math.sqrt(share * (1 - share) / rows)


def test_dry_takes_its_penalty_from_the_token_that_would_go_on_repeating(processed):
    # 5 6 7 8 | 9 | 5 6 7: three tokens match, and 8 followed them. 9 followed 8, which is not at the end.
    sampler = replace(OFF, dry_multiplier=0.8, dry_sequence_breakers=())
    logits = torch.zeros(1, 10)
    scores = processed(sampler, [5, 6, 7, 8, 9], [5, 6, 7], logits)
    assert scores[0, 8].item() == pytest.approx(-0.8 * 1.75 ** (3 - 2))
    assert scores[0].count_nonzero() == 1
    harder = replace(sampler, dry_base=2.0, dry_allowed_length=1)
    assert processed(harder, [5, 6, 7, 8, 9], [5, 6, 7], logits)[0, 8].item() == pytest.approx(-0.8 * 2**2)
    assert processed(replace(sampler, dry_allowed_length=4), [5, 6, 7, 8, 9], [5, 6, 7], logits).count_nonzero() == 0


# Order


def test_the_default_order_is_transformers(processed):
    generator = torch.Generator().manual_seed(5)
    prompt = [1, 5, 5, 9]
    for _ in range(20):
        logits = torch.randn(3, 50, generator=generator) * 3
        sampler = replace(OFF, temperature=1.7, top_k=30, top_p=0.95, min_p=0.02, typical_p=0.9, repetition_penalty=1.3)
        theirs = LogitsProcessorList([
            hf.RepetitionPenaltyLogitsProcessor(1.3), hf.TemperatureLogitsWarper(1.7), hf.TopKLogitsWarper(30),
            hf.TopPLogitsWarper(0.95), hf.MinPLogitsWarper(0.02), hf.TypicalLogitsWarper(0.9),
        ])  # fmt: skip
        expected = theirs(torch.tensor([prompt] * 3), logits.clone())
        torch.testing.assert_close(processed(sampler, prompt, logits=logits), expected)


def test_near_greedy_keeps_exactly_the_half_as_likely_and_then_flattens(distribution):
    near = replace(PRESETS["near-greedy"], repetition_penalty=1.0)
    powers = {i: P[i] ** (1 / 3) for i in (1, 3)}  # 0.4 and 0.3; half of the likeliest is 0.2
    assert distribution(near) == pytest.approx({i: q / sum(powers.values()) for i, q in powers.items()}, rel=1e-5)
    # With temperature first, even 0.05 is half as likely as 0.4: (0.05 / 0.4) ** (1 / 3) = 0.5.
    assert set(distribution(replace(near, order=ORDER))) >= {1, 2, 3, 4}


def test_stages_come_in_the_order_asked_for(distribution, processed):
    # Of the two likeliest, 1 is penalised: after top-k it stays, before top-k it falls out.
    sampler = replace(OFF, top_k=2, presence_penalty=2.0)
    assert set(distribution(sampler, [0], [1])) == {3, 4}
    late = replace(sampler, order=["top_k", "penalties", *(s for s in ORDER if s not in ("top_k", "penalties"))])
    assert set(distribution(late, [0], [1])) == {1, 3}
    assert processed(late, [0], [1])[0, 1] == LOGITS[0, 1] - 2.0


# Drawing


def test_tokens_are_drawn_as_often_as_they_are_likely(row):
    rows = [row(OFF, key=key) for key in range(4000)]
    across = Counter(choose(LOGITS.expand(4000, -1), rows))
    one = row(replace(OFF, seed=9))
    along = Counter(choose(LOGITS, [one])[0] for _ in range(4000))
    for seen in (across, along):
        chi_squared = sum((seen[i] - 4000 * p) ** 2 / (4000 * p) for i, p in enumerate(P))
        assert chi_squared < 23.5  # 4 degrees of freedom, one time in ten thousand
    assert one.counts.tolist() == [along[t] for t in one.tokens]


def test_a_draw_inverts_the_cumulative_distribution_at_the_number_of_its_stream(row):
    cumulative = torch.tensor(P).cumsum(0)
    for seed, key in [(0, 0), (3, 1), (10**12, 5)]:
        stream = torch.Generator().manual_seed((seed * 1_000_003 + key) % 2**63)
        made = row(replace(OFF, seed=seed), key=key)
        for _ in range(20):
            u = torch.rand((), generator=stream, dtype=torch.float64)
            assert choose(LOGITS, [made]) == [int((cumulative <= u).sum())]


def test_seeds_and_keys_reproduce_a_reply_and_different_ones_do_not(row):
    sampler = replace(PRESETS["wild"], xtc_probability=0.5, seed=3)

    def reply(sampler, key):
        made = row(sampler, key=key)
        return [choose(LOGITS, [made])[0] for _ in range(30)]

    assert reply(sampler, 1) == reply(sampler, 1)
    assert reply(sampler, 1) != reply(sampler, 2)
    assert reply(sampler, 1) != reply(replace(sampler, seed=4), 1)


MIXED = [
    PRESETS["greedy"],
    PRESETS["near-greedy"],
    MEASURE,
    replace(MEASURE, seed=5, max_new_tokens=7),
    Sampler(top_p=0.8, frequency_penalty=0.4),
    Sampler(typical_p=0.7, presence_penalty=1.0, logit_bias={3: -100, 9: 4.0}),
    Sampler(temperature=0.0, dry_multiplier=2.0, repetition_penalty=1.4),
    Sampler(temperature=1.3, dry_multiplier=1.0, dry_range=6, xtc_probability=0.5),
]


def test_a_row_alone_gets_the_tokens_it_gets_in_a_mixed_batch(row):
    generator = torch.Generator().manual_seed(2)
    steps = [torch.randn(16, 60, generator=generator) * 2 for _ in range(12)]
    prompts = [torch.randint(0, 60, (1 + i % 5,), generator=generator).tolist() for i in range(16)]
    together = [row(MIXED[i % 8], prompts[i], key=i) for i in range(16)]
    replies = list(zip(*(choose(logits, together) for logits in steps), strict=True))
    for i in range(16):
        alone = row(MIXED[i % 8], prompts[i], key=i)
        assert [choose(logits[i : i + 1], [alone])[0] for logits in steps] == list(replies[i])
    # The two rows of one sampler that differ in seed alone are drawn together and still have separate random streams.
    assert replies[2] != replies[3]


@pytest.mark.parametrize("sampler", MIXED[3:], ids=lambda s: "+".join(s.stages))
def test_the_logits_stay_as_they_are(row, sampler):
    logits = torch.randn(2, 60, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    choose(logits, [row(sampler, [3, 9, 3, 9], [3], key=k) for k in range(2)])
    assert torch.equal(logits, before)


def test_greedy_is_the_argmax_and_passes_by_what_shapes_a_draw(row):
    sampler = replace(PRESETS["greedy"], typical_p=0.2, xtc_probability=1.0, xtc_threshold=0.0)
    made = row(sampler)
    before = made.stream.get_state()
    assert choose(LOGITS, [made]) == [1]
    assert torch.equal(made.stream.get_state(), before)


def test_half_precision_logits_are_drawn_as_their_fp32_copy(row):
    logits = torch.randn(8, 60, generator=torch.Generator().manual_seed(1)).bfloat16()
    for sampler in MIXED:
        draws = [[row(sampler, [3, 9], key=k) for k in range(8)] for _ in range(2)]
        assert choose(logits, draws[0]) == choose(logits.float(), draws[1])


def test_logprobs_are_of_the_models_own_distribution():
    own, top = logprobs(LOGITS[0], 4, 3)
    assert own == pytest.approx(math.log(P[4]), rel=1e-5)
    assert [token for token, _ in top] == [1, 3, 4]
    assert [value for _, value in top] == pytest.approx([math.log(P[i]) for i in (1, 3, 4)], rel=1e-5)
    assert logprobs(LOGITS[0], 0, 0)[1] == []
    assert len(logprobs(LOGITS[0].bfloat16(), 0, 99)[1]) == 5

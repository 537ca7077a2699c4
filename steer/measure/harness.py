"""Chats under edits, scored: replies, text scorers, repetition, KL divergence and perplexity.

The dose response, `calibrate`, the checks of `steer.finding` and the search for a bake take all their figures from this
file, so that these can be compared. First come dose responses, then replies, then the costs on given texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import nll_loss

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.sampler import MEASURE, Sampler
from steer.core.trait import Trait
from steer.errors import UsageError
from steer.files import without_nan
from steer.measure.contrast import Reply
from steer.measure.scorer import Scorer, marker_rate
from steer.model.forward import Head, head_of
from steer.model.loaded import Message, as_messages
from steer.model.prefill import prefill
from steer.model.steered import SteeredModel
from steer.progress import Advance

DOSES = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Amounts of the slider that a dose response measures."""
SAMPLES = 2
"""Replies to each topic under each setting of a dose response."""
ROWS = 64
"""Texts per forward pass, at most, counted once per edit."""
TOKENS = 64
"""Tokens of a text whose logits are in memory at the same time."""
PROSE_TOKENS = 256
"""Most tokens of a text that `text_entropies` reads."""
Numbers = Float[np.ndarray, " n"]
Text = tuple[Sequence[int], Sequence[int]]
"""(context, text) as token ids: the text is scored, the context precedes it."""


@dataclass(frozen=True)
class Scores:
    """What was measured under one edit. A figure that was not measured is nan, and null in JSON."""

    rate: float = math.nan
    """Share of the replies that the text scorer calls the trait."""
    probability: float = math.nan
    """The scorer's mean probability, smoother than the rate."""
    kl: float = math.nan
    """KL(untouched || edited) on replies to neutral prompts, nats per token. A system prompt has none: it changes the
    text before those replies."""
    perplexity: float = math.nan
    """Perplexity of the replies under the untouched model; in a search, of plain prose under the edit."""
    repetition: float = math.nan
    """Share of trigrams seen before in the same reply."""

    def as_json(self) -> dict[str, Any]:
        """The scores as JSON."""
        return without_nan(asdict(self))


@dataclass(frozen=True)
class Setting:
    """One condition to measure: an edit, or a system prompt, with its label. Without either: the model as it is."""

    label: str
    edit: Edit | None = None
    amount: float | None = None
    """Amount of the slider; None for controls and for a baked checkpoint."""
    share: float = 0.0
    """Displacement of the residual stream as a share of the site's median norm."""
    system: str | None = None
    """A system prompt that replaces steering, for the control by plain prompting."""


@dataclass(frozen=True, kw_only=True)
class Point(Scores):
    """The scores under one `Setting`, one row of a dose response."""

    label: str
    amount: float | None
    share: float
    markers: float
    """Marker words per 100 words; nan for a trait without markers."""
    examples: tuple[str, ...] = ()
    """The first reply to each of the first three topics."""


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's replies to one trait's topics under one edit, and what the trait's scorer says about each."""

    replies: list[Reply]
    probabilities: Numbers
    """The scorer's probability that a reply shows the trait."""

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """The tokens of each reply."""
        return [r.ids for r in self.replies]

    @property
    def texts(self) -> list[str]:
        """The text of each reply."""
        return [r.text for r in self.replies]

    @property
    def repetitions(self) -> Numbers:
        """The repetition of each reply."""
        return np.array([repetition(r) for r in self.ids])

    @property
    def scores(self) -> Scores:
        """The means over all replies."""
        shows = self.probabilities > 0.5
        return Scores(float(shows.mean()), float(self.probabilities.mean()), repetition=mean_repetition(self.ids))


def dose_settings(direction: Direction, amounts: Sequence[float] = DOSES) -> list[Setting]:
    """One setting per amount of `add`; amount 0 is the untouched model."""
    return [
        Setting(f"{a:+g}" if a else "0", Edit(add=((direction, a),)) if a else None, a, direction.share(a))
        for a in amounts
    ]


def control_settings(direction: Direction, trait: Trait, seed: int = 0) -> list[Setting]:
    """Controls for steering: a random direction with the same displacement, and the opposite instruction, if there is
    one, as a system prompt."""
    random = Edit(add=((random_like(direction, seed), -1.0),))
    prompt = [Setting("system prompt instead", system=trait.without_instruction)] if trait.without_instruction else []
    return [Setting("random direction, -1", random, share=direction.share(1)), *prompt]


def random_like(direction: Direction, seed: int = 0) -> Direction:
    """A random direction that moves the residual stream as far as `direction`."""
    noise = torch.randn(direction.width, generator=torch.Generator().manual_seed(seed))
    return replace(direction, name="random", vector=noise)


def measure_settings(
    model: SteeredModel,
    scorer: Scorer,
    settings: Sequence[Setting],
    topics: Sequence[str],
    reference: Reference,
    **options: Any,
) -> list[Point]:
    """As `measure_answers`, with its options; only the `Point` per setting."""
    return [point for point, _ in measure_answers(model, scorer, settings, topics, reference, **options)]


def measure_answers(
    model: SteeredModel,
    scorer: Scorer,
    settings: Sequence[Setting],
    topics: Sequence[str],
    reference: Reference,
    *,
    sampler: Sampler = MEASURE,
    samples: int = SAMPLES,
    judge: SteeredModel | None = None,
    perplexities: bool = True,
    on_tokens: Advance | None = None,
) -> list[tuple[Point, Answers]]:
    """Let the model reply to every topic under every setting, `samples` times, and score the replies: a `Point` per
    setting, and the replies that it was measured on, those to one topic in a row.

    KL is computed on `reference`, the untouched model's replies to neutral prompts. `judge` is the model that computes
    the perplexity of each topic's first reply: by default the untouched `model`; for a baked checkpoint pass its
    source. Without `perplexities` they are not measured.
    """
    edits, systems = [s.edit for s in settings], [s.system for s in settings]
    found = answers(model, [scorer], [topics], edits, sampler, samples=samples, systems=systems, on_tokens=on_tokens)
    groups, surprises = [group for (group,) in found], [math.nan] * len(settings)
    if perplexities:
        # Each topic is read once for all settings.
        asked = [(judge or model).prompt_ids(as_messages(topic), thoughts=False) for topic in topics]
        rows = [
            [([*p, *r.thoughts], r.ids) for p, r in zip(asked, g.replies[::samples], strict=True) if r.ids]
            for g in groups
        ]
        entropies = iter(text_costs(judge or model, [row for group in rows for row in group], [None])[0, :, 1])
        surprises = [perplexity([next(entropies) for _ in group], [len(r) for _, r in group]) for group in rows]
    # The untouched model has a KL of 0, but a baked checkpoint (`judge` is given) has one without an edit.
    moved = [not s.system and (s.edit is not None or judge is not None) for s in settings]
    costs = iter(reference.kls(model, [e for e, m in zip(edits, moved, strict=True) if m]) if any(moved) else ())
    kls = [next(costs) if m else math.nan if s.system else 0.0 for s, m in zip(settings, moved, strict=True)]
    points = [
        Point(
            **vars(replace(g.scores, kl=kl, perplexity=surprise)),
            label=s.label,
            amount=s.amount,
            share=s.share,
            markers=float(np.mean([marker_rate(t, scorer.trait) for t in g.texts])),
            examples=tuple(g.texts[: 3 * samples : samples]),
        )
        for s, g, kl, surprise in zip(settings, groups, kls, surprises, strict=True)
    ]
    return list(zip(points, groups, strict=True))


def measure_baked(
    source: SteeredModel,
    baked: SteeredModel,
    before: Point,
    scorer: Scorer,
    reference: Reference,
    texts: Sequence[str],
    *,
    on_tokens: Advance | None = None,
) -> dict[str, Any]:
    """Trait rate, KL on the source's replies to neutral prompts, and perplexity of plain `texts`, before and after
    baking. `before` is the point of the untouched source in a dose response on the trait's held-out topics."""
    settings, topics = [Setting("baked")], scorer.trait.held_out
    (after,) = measure_settings(baked, scorer, settings, topics, reference, judge=source, on_tokens=on_tokens)
    plain = [perplexity(*text_entropies(model, texts)) for model in (source, baked)]
    return {
        "before": before.as_json(),
        "after": after.as_json(),
        "rate_ratio": after.rate / before.rate if before.rate else None,
        "kl": after.kl,
        "perplexity_before": plain[0],
        "perplexity_after": plain[1],
        "perplexity_ratio": plain[1] / plain[0],
    }


def answers(
    model: SteeredModel,
    scorers: Sequence[Scorer],
    topics: Sequence[Sequence[str]],
    edits: Sequence[Edit | None],
    sampler: Sampler,
    *,
    samples: int = 1,
    systems: Sequence[str | None] | None = None,
    on_tokens: Advance | None = None,
) -> list[list[Answers]]:
    """Per edit and scorer: replies to the scorer's topics, each topic `samples` times in a row. All replies are
    generated in one call, see `replies_under`."""
    asked = [topic for part in topics for topic in part for _ in range(samples)]
    out = []
    for replies in map(iter, replies_under(model, asked, edits, sampler, systems=systems, on_tokens=on_tokens)):
        row = []
        for scorer, part in zip(scorers, topics, strict=True):
            batch = list(islice(replies, samples * len(part)))
            row.append(Answers(batch, scorer.probabilities([r.text for r in batch])))
        out.append(row)
    return out


def replies_under(
    model: SteeredModel,
    prompts: Sequence[str],
    edits: Sequence[Edit | None],
    sampler: Sampler,
    *,
    systems: Sequence[str | None] | None = None,
    on_tokens: Advance | None = None,
) -> list[list[Reply]]:
    """Replies to every prompt under each edit (None: the untouched model), without thoughts, generated in one call.

    A prompt draws the same random numbers under every edit, so that differences come from the edit. `systems` has a
    system prompt per edit.
    """
    per = len(prompts)
    chats = [as_messages(prompt, system) for system in systems or [None] * len(edits) for prompt in prompts]
    made = model.replies(
        chats,
        sampler,
        [e for e in edits for _ in prompts],
        keys=list(range(per)) * len(edits),
        on_tokens=on_tokens,
        thoughts=False,
    )
    replies = Reply.all_of(model, chats, made)
    return [replies[i * per : (i + 1) * per] for i in range(len(edits))]


def neutral_replies(
    model: SteeredModel, prompts: Sequence[str], *, tokens: int = 48, on_tokens: Advance | None = None
) -> list[Reply]:
    """The untouched model's replies of at most `tokens` tokens to neutral prompts, without the empty ones."""
    chats: list[list[Message]] = [as_messages(p) for p in prompts]
    with model.untouched():
        made = model.replies(chats, replace(MEASURE, max_new_tokens=tokens), on_tokens=on_tokens, thoughts=False)
    return answered(model, Reply.all_of(model, chats, made))


def answered(model: SteeredModel, replies: Sequence[Reply]) -> list[Reply]:
    """The replies that are not empty. Errors: UsageError if all are, as nothing can be measured on them."""
    found = [r for r in replies if r.ids]
    if not found:
        raise UsageError(
            f"{model.name}: expected replies to neutral prompts, found {len(replies)} that are empty, thoughts left "
            "out; check its chat template and end tokens"
        )
    return found


def repetition(ids: Sequence[int | str]) -> float:
    """Share of a text's trigrams, of tokens or words, that occurred in it before (seq-rep-3, Welleck et al. 2019)."""
    grams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean_repetition(replies: Sequence[Sequence[int]]) -> float:
    """Mean `repetition` over replies; 0 for none."""
    return float(np.mean([repetition(r) for r in replies])) if replies else 0.0


# Costs on given texts


def plain_paragraphs() -> tuple[list[str], list[str]]:
    """Plain prose written for this project, in two halves: one for searching, one for the final measurement."""
    text = (resources.files("steer") / "measure" / "texts" / "plain.txt").read_text(encoding="utf-8")
    paragraphs = [p.replace("\n", " ") for p in text.strip().split("\n\n")]
    return paragraphs[0::2], paragraphs[1::2]


def prose_texts(model: SteeredModel, passages: Sequence[str], tokens: int) -> list[Text]:
    """Passages cut to `tokens` tokens, each with the first token of its frame as context."""
    framed = [model.encode(p, frame=True)[: tokens + 1] for p in passages]
    return [(ids[:1], ids[1:]) for ids in framed]


@dataclass(frozen=True, eq=False)
class Reference:
    """The untouched model's replies to neutral prompts and its predictions on them, to compare other models with.

    The predictions are stored as hidden states: probabilities over the vocabulary would take a hundred times the
    memory.
    """

    texts: tuple[Text, ...]
    """(prompt, reply) as token ids."""
    hidden: tuple[Float[Tensor, "tokens d"], ...]
    """Per reply, the input of the LM head at each position that predicts a reply token."""
    head: Head

    @classmethod
    def of(cls, model: SteeredModel, replies: Sequence[Reply]) -> Reference:
        """Run the untouched model over `replies` once and store its predictions."""
        texts = tuple((r.prompt_ids(model), r.ids) for r in replies)
        hidden = {i: rows[0].clone() for i, rows in _hidden(model, texts, [None])}
        for rows in hidden.values():
            model.check_finite(rows)
        return cls(texts, tuple(hidden[i] for i in range(len(texts))), head_of(model))

    def kls(self, model: SteeredModel, edits: Sequence[Edit | None]) -> list[float]:
        """KL(untouched || `model`) under each edit, nats per reply token. `model` may be another checkpoint."""
        return (self.kl_sums(model, edits).sum(1) / self.lengths.sum()).tolist()

    def kl_sums(self, model: SteeredModel, edits: Sequence[Edit | None]) -> Float[np.ndarray, "edits replies"]:
        """KL(untouched || `model`) under each edit, summed over each reply's tokens, nats."""
        return text_costs(model, self.texts, edits, self)[..., 0]

    @property
    def lengths(self) -> Numbers:
        """Tokens of each reply."""
        return np.array([float(len(text)) for _, text in self.texts])


def row_costs(
    model: SteeredModel, texts: Sequence[Text], edits: Sequence[Edit], on_tokens: Advance | None = None
) -> list[tuple[float, float]]:
    """(KL(untouched || edited), cross-entropy) in nats per token of the texts: first those of the untouched model, then
    those under each edit. inf where a logit is not a number."""
    sums = text_costs(model, texts, [None, *edits], on_tokens=on_tokens).sum(1)
    means = sums / max(1, sum(len(text) for _, text in texts))
    return [(divergence, entropy) for divergence, entropy in np.where(np.isnan(means), math.inf, means).tolist()]


def text_entropies(model: SteeredModel, texts: Sequence[str]) -> tuple[Numbers, Numbers]:
    """(cross-entropy of each text in nats, summed over its tokens; number of those tokens). Each text is cut to
    `PROSE_TOKENS`. The first token is context and not counted; texts of one token are left out."""
    ids = [model.encode(text)[: min(PROSE_TOKENS, model.context)] for text in texts]
    rows = [(i[:1], i[1:]) for i in ids if len(i) > 1]
    return text_costs(model, rows, [None])[0, :, 1], np.array([float(len(rest)) for _, rest in rows])


def perplexity(entropies: Sequence[float] | Numbers, counts: Sequence[float] | Numbers) -> float:
    """Perplexity per token of texts, from the cross-entropy of each in nats and its number of tokens."""
    return float(np.exp(sum(entropies) / max(sum(counts), 1)))


@torch.inference_mode()
def text_costs(
    model: SteeredModel,
    texts: Sequence[Text],
    edits: Sequence[Edit | None],
    reference: Reference | None = None,
    on_tokens: Advance | None = None,
) -> Float[np.ndarray, "edits texts 2"]:
    """(KL(base || edited), cross-entropy) of each text under each edit, summed over its tokens, nats.

    The base is `reference`, made of the same texts, or without it the first edit, whose KL is 0. `on_tokens` is called
    once per text with the number of tokens that went through the model, context included and counted once per edit.
    """
    out, head = np.zeros((len(edits), len(texts), 2)), head_of(model)
    for i, rows in _hidden(model, texts, edits):
        before, text = texts[i]
        base_head, base = (reference.head, reference.hidden[i]) if reference else (head, rows[0])
        out[:, i] = _compared(base_head, base, head, rows, text)
        if on_tokens is not None:
            on_tokens(len(edits) * (len(before) + len(text)))
    return out


@torch.inference_mode()
def _hidden(
    model: SteeredModel, texts: Sequence[Text], edits: Sequence[Edit | None]
) -> Iterator[tuple[int, list[Float[Tensor, "tokens d"]]]]:
    """Yield (index of a text, per edit the LM head's input at the positions that predict the text's tokens).

    The order is not that of `texts`: texts with the same context are read together, so that it is read once.
    """
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i][0]), tuple(texts[i][0]), len(texts[i][1])))
    together = max(1, ROWS // len(edits))
    for start in range(0, len(order), together):
        batch = order[start : start + together]
        rows = [texts[i] for i in batch for _ in edits]
        with model.steering.alone(edits):
            # The last token is left out: its prediction is not scored.
            read = prefill(
                model,
                [[*before, *text[:-1]] for before, text in rows],
                prompts=[len(before) for before, _ in rows],
                which=list(range(len(edits))) * len(batch) if len(edits) > 1 else None,
            ).hidden
        for j, i in enumerate(batch):
            yield i, [h[-len(texts[i][1]) :] for h in read[j * len(edits) : (j + 1) * len(edits)]]


def _compared(
    base_head: Head, base: Float[Tensor, "tokens d"], head: Head, rows: Sequence[Float[Tensor, "tokens d"]], text: Any
) -> Float[np.ndarray, "rows 2"]:
    """(KL(base || row), cross-entropy of the row) for each row of hidden states, summed over the text's tokens, nats.

    `TOKENS` tokens at a time: the probabilities over the vocabulary at every token would dominate memory."""
    out, targets = np.zeros((len(rows), 2)), torch.tensor(text, device=base.device)
    others = any(hidden is not base for hidden in rows)
    for start in range(0, len(targets), TOKENS):
        part = slice(start, start + TOKENS)
        expected = base_head(base[part]).log_softmax(-1)
        weights = expected.exp() if others else expected
        for sums, hidden in zip(out, rows, strict=True):
            logprobs = expected
            if hidden is not base:
                logprobs = head(hidden[part]).log_softmax(-1)
                sums[0] += float((weights * (expected - logprobs)).sum())
            sums[1] += float(nll_loss(logprobs, targets[part], reduction="sum"))
    return out

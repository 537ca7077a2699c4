"""Text scorers: how much of a trait a reply shows, judged from its words alone.

`steer find` trains one on contrast replies; dose responses, calibration and searches then score replies with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline

from steer.core.trait import Trait, shipped_traits
from steer.errors import TraitNotFoundError
from steer.files import one_line
from steer.measure.contrast import Contrast, Reply

FOLDS = 8
"""Folds of the topics in which replies are judged by a classifier that was trained without them."""
_SHIPPED = resources.files("steer") / "measure" / "probes" / "items"


@dataclass(frozen=True, eq=False)
class Scorer:
    """A logistic regression on word counts, trained on the contrast replies of the fit topics. It never sees an
    activation, so it is independent of the direction it evaluates.

        scorer = Scorer.train(contrast)
        scorer.rate(["You should never lie to a friend.", "Sure, here it is."])
    """

    trait: Trait
    classifier: Pipeline
    auroc: float
    """AUROC on the contrast replies of the held-out topics."""
    marker_auroc: float
    """AUROC of the plain marker rate on the same replies, for comparison; nan for a trait without markers."""

    @classmethod
    def train(cls, contrast: Contrast) -> Scorer:
        """Fit on the replies to the fit topics, and measure the AUROCs on those to the held-out topics.

        Errors: TraitNotFoundError for replies that a classifier on words cannot learn from.
        """
        trait, classifier = contrast.trait, word_classifier()
        texts, labels = _labelled(contrast.fit_with, contrast.fit_without)
        with _named_errors(trait):
            classifier.fit(texts, labels)
        held, truth = _labelled(contrast.held_out_with, contrast.held_out_without)
        rates = [marker_rate(t, trait) for t in held]
        return cls(
            trait,
            classifier,
            auroc=float(roc_auc_score(truth, classifier.predict_proba(held)[:, 1])),
            marker_auroc=float(roc_auc_score(truth, rates)) if trait.markers else math.nan,
        )

    @classmethod
    def cross_fitted(cls, trait: Trait, shown: Sequence[str], hidden: Sequence[str], groups: Sequence[str]) -> Scorer:
        """Fit on texts with the trait and texts without. The AUROC is that of classifiers that each text's group was
        left out of (cross-validation in `FOLDS` folds); `groups` names the group of each text, in the same order.

        Errors: TraitNotFoundError for texts that a classifier on words cannot learn from.
        """
        texts, truth = np.array([*shown, *hidden]), np.array([1] * len(shown) + [0] * len(hidden))
        odds = np.zeros(len(texts))
        with _named_errors(trait):
            for rest, out in GroupKFold(min(FOLDS, len(set(groups)))).split(texts, truth, groups):
                if len(set(truth[rest])) == 2:  # else nothing is known of the others
                    odds[out] = word_classifier().fit(texts[rest], truth[rest]).decision_function(texts[out])
            classifier = word_classifier().fit(texts, truth)
        return cls(trait, classifier, float(roc_auc_score(truth, odds)), math.nan)

    @classmethod
    @cache
    def shipped(cls, trait: str) -> Scorer:
        """The scorer of a trait that ships, trained on the default merge's contrast replies: the same for all models.

        Errors: FileNotFoundError for a trait without one.
        """
        return cls.from_json(json.loads((_SHIPPED / f"{trait}.json").read_text(encoding="utf-8")))

    @classmethod
    def all_shipped(cls) -> dict[str, Scorer]:
        """The scorers that ship, by the names of their traits."""
        return {name: cls.shipped(name) for name in shipped_traits() if (_SHIPPED / f"{name}.json").is_file()}

    def as_json(self) -> dict[str, Any]:
        """The scorer as a JSON value: per word its inverse document frequency and its weight."""
        counts, judge = self._steps
        names, weights = counts.get_feature_names_out(), np.asarray(judge.coef_)[0]
        return {
            "trait": self.trait.name,
            "auroc": round(self.auroc, 4),
            "marker_auroc": round(self.marker_auroc, 4) if self.trait.markers else None,
            "intercept": round(float(np.asarray(judge.intercept_)[0]), 4),
            "words": {
                str(w): [round(float(f), 4), round(float(c), 4)]
                for w, f, c in zip(names, counts.idf_, weights, strict=True)
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], trait: Trait | None = None) -> Scorer:
        """The scorer of a value that `as_json` returned. `trait`: its trait, if that does not ship."""
        classifier = word_classifier(vocabulary=list(value["words"]))
        markers = math.nan if value["marker_auroc"] is None else value["marker_auroc"]
        scorer = cls(trait or Trait.load(value["trait"]), classifier, value["auroc"], markers)
        counts, judge = scorer._steps
        counts.idf_, weights = np.array(list(value["words"].values())).T
        judge.coef_, judge.intercept_, judge.classes_ = weights[None], np.array([value["intercept"]]), np.array([0, 1])
        return scorer

    def probabilities(self, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
        """Each text's probability of showing the trait."""
        return self.classifier.predict_proba(list(texts))[:, 1]

    def log_odds(self, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
        """The logarithm of the odds that each text shows the trait: it goes on where probabilities end at 0 and 1."""
        return self.classifier.decision_function(list(texts))

    def rate(self, texts: Sequence[str]) -> float:
        """Share of the texts that show the trait: probability above one half."""
        return float((self.probabilities(texts) > 0.5).mean())

    def words(self, count: int = 12) -> tuple[list[str], list[str]]:
        """The `count` words with the largest weight for the trait, and those against it, to check what was learnt."""
        counts, judge = self._steps
        names = np.asarray(counts.get_feature_names_out())
        order = np.argsort(np.asarray(judge.coef_)[0], kind="stable")
        return [str(names[i]) for i in order[::-1][:count]], [str(names[i]) for i in order[:count]]

    @property
    def _steps(self) -> tuple[TfidfVectorizer, LogisticRegression]:
        counts, judge = self.classifier[0], self.classifier[1]
        assert isinstance(counts, TfidfVectorizer)
        assert isinstance(judge, LogisticRegression)
        return counts, judge


def chance_auroc(shown: int, hidden: int) -> float:
    """The AUROC that chance reaches on so many texts with a trait and without: two standard errors (Mann-Whitney) above
    0.5."""
    return 0.5 + 2 * math.sqrt((shown + hidden + 1) / (12 * shown * hidden))


def clear_replies(contrast: Contrast) -> Contrast:
    """The contrast with only those fit replies that show what their instruction asked for.

    Each reply is judged by a classifier that was trained without its topic (cross-validation in `FOLDS` folds). All
    held-out replies stay.
    """
    replies = [*contrast.fit_with, *contrast.fit_without]
    texts, labels = _labelled(contrast.fit_with, contrast.fit_without)
    topics = [r.chat[-1]["content"] for r in replies]
    cv = GroupKFold(min(FOLDS, len(set(topics))))  # a topic is missing where all its replies were empty
    with _named_errors(contrast.trait):
        judged = cross_val_predict(word_classifier(), texts, labels, groups=topics, cv=cv)
    clear = [[r for r, j, k in zip(replies, judged, labels, strict=True) if j == k == side] for side in (1, 0)]
    # A model that ignores its instructions leaves almost no clear replies: then all replies are the better data.
    if min(map(len, clear)) < len(replies) // 8:
        return contrast
    return replace(contrast, fit_with=tuple(clear[0]), fit_without=tuple(clear[1]))


@contextmanager
def _named_errors(trait: Trait) -> Iterator[None]:
    """Turn scikit-learn's ValueError, raised for instance when replies share no word, into a TraitNotFoundError."""
    try:
        yield
    except ValueError as e:
        raise TraitNotFoundError(
            f"trait {trait.name!r}: expected replies that a classifier on words can learn from, found: {one_line(e)}"
        ) from e


def word_classifier(vocabulary: Sequence[str] | None = None) -> Pipeline:
    """A logistic regression on word counts, not fitted. `vocabulary`: the words it counts; None: those of two texts."""
    return make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b[\w']+\b", vocabulary=vocabulary),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000),
    )


def _labelled(with_: Sequence[Reply], without: Sequence[Reply]) -> tuple[list[str], list[int]]:
    """Texts of replies, and 1 for each with the trait, 0 for each without."""
    return [r.text for r in (*with_, *without)], [1] * len(with_) + [0] * len(without)


def marker_rate(text: str, trait: Trait) -> float:
    """Marker words and phrases of a trait per 100 words; nan for a trait without markers."""
    if not trait.markers:
        return math.nan
    words = text.lower().replace("\u2019", "'")
    # Longest first, so that a phrase is counted once and its words are not counted again.
    pattern = "|".join(map(re.escape, sorted(trait.markers, key=len, reverse=True)))
    return 100 * len(re.findall(rf"\b(?:{pattern})\b", words)) / max(len(words.split()), 1)

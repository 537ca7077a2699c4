"""A realistic eval.json without a model: what the report and the page are tested on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ARMS = ("merged", "slid", "baked")
PROBES: dict[str, dict[str, Any]] = {
    # name -> metrics (name, better, label, chance, exponent), range of n, range of turn, mean of the first arm
    "capability": {"metrics": [("perplexity", "lower", "perplexity of plain text", None, True)], "mean": 2.7},
    "positions": {
        "metrics": [("accuracy", "higher", "share of right answers", 0.25, False),
                    ("margin", "higher", "log-probability of the right answer over the best wrong one", None, False)],
        "n": 9, "turns": 20, "mean": 0.62,
    },
    "consequences": {"metrics": [("accuracy", "higher", "share of right answers", 0.5, False)], "n": 4, "mean": 0.58},
    "moralizing": {"metrics": [("rate", "neither", "share of replies that moralize", None, False)], "mean": 0.8},
    "prose": {"metrics": [("repetition", "lower", "share of repeated trigrams", None, False)], "mean": 0.04},
    "drift": {"metrics": [("perplexity", "lower", "perplexity of the next reply", None, True)], "turns": 40,
              "mean": 2.2},
}  # fmt: skip
SHIFTS: Mapping[tuple[str, str], float] = {
    ("slid", "positions"): -0.25, ("slid", "moralizing"): -0.75, ("slid", "prose"): 0.06,
    ("baked", "moralizing"): -0.65, ("baked", "consequences"): 0.02,
}  # fmt: skip
"""(arm, probe) -> what is added to the mean of the first arm."""


def synthetic_eval(
    arms: Sequence[str] = ARMS,
    probes: Sequence[str] = tuple(PROBES),
    *,
    items: int = 60,
    shifts: Mapping[tuple[str, str], float] = SHIFTS,
    skipped: Mapping[tuple[str, str], str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the contents of an eval.json. `skipped`: (arm, probe) -> why the arm was not asked."""
    random = np.random.default_rng(seed)
    return {
        "steer": "1.0", "seed": seed, "quick": True, "model": "merged",
        "arms": [{"name": a, "about": f"the checkpoint {a}", "dtype": "float32"} for a in arms],
        "probes": [_probe(name, arms, items, shifts, skipped or {}, random) for name in probes],
    }  # fmt: skip


def _probe(
    name: str, arms: Sequence[str], items: int, shifts: Mapping[tuple[str, str], float],
    skipped: Mapping[tuple[str, str], str], random: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    shape = PROBES[name]
    metrics = [dict(zip(("name", "better", "label", "chance", "exponent"), m, strict=True)) for m in shape["metrics"]]
    ease, n, turn = random.random((len(metrics), items)), shape.get("n"), shape.get("turns")
    results, values = {}, {}
    for arm in arms:
        if why := skipped.get((arm, name)):
            results[arm] = {"figures": [], "examples": [], "notes": [], "seconds": 0.0, "skipped": why}
            continue
        figures = []
        for j, m in enumerate(metrics):
            mean = shape["mean"] + shifts.get((arm, name), 0.0)
            share = m["chance"] is not None or m["name"] == "rate"
            noise = random.normal(0, 0.02, items)
            found = (
                (ease[j] + random.normal(0, 0.15, items) < mean).astype(float)
                if share
                else mean + 0.3 * mean * (ease[j] - 0.5) + noise
            )
            values[arm, m["name"]] = found
            figures += [
                {"metric": m["name"], "item": f"{name}-{i}", "value": float(x), "group": "",
                 "n": i % n if n else None, "turn": i % turn * 2 if turn else None}
                for i, x in enumerate(found)
            ]  # fmt: skip
        examples = [
            {"item": f"{name}-{i}", "asked": f"You put the sword into the box, and {i} moves later?\nIt is in the…",
             "right": "chest" if metrics[0]["chance"] else "", "answered": f"chest (0.6{i}), box (0.3{i}) says {arm}"}
            for i in range(6)
        ]  # fmt: skip
        results[arm] = {"figures": figures, "examples": examples, "notes": [], "seconds": 12.5, "skipped": None}
    summary = [_summary(a, m, values, arms[0]) for m in metrics for a in arms if (a, m["name"]) in values]
    signal = {"status": "unknown", "moved": [], "chance": metrics[0]["chance"], "line": ""}
    says = f"A higher figure means that the model is good at {name}."
    return {"name": name, "says": says, "sha256": "0" * 64, "metrics": metrics, "arms": results, "summary": summary,
            "signal": signal}  # fmt: skip


def _summary(arm: str, metric: dict[str, Any], values: dict[Any, Any], first: str) -> dict[str, Any]:
    found = values[arm, metric["name"]]
    mean, half = _mean(found)
    row = {"arm": arm, "metric": metric["name"], "value": mean, "low": mean - half, "high": mean + half,
           "items": len(found)}  # fmt: skip
    if arm != first and (first, metric["name"]) in values:
        difference, half = _mean(found - values[first, metric["name"]])
        p = math.erfc(abs(difference) / max(half, 1e-9) * 1.96 / math.sqrt(2))
        row |= {"difference": difference, "difference_low": difference - half, "difference_high": difference + half,
                "p": p, "p_corrected": min(1.0, 5 * p), "moved": 5 * p < 0.05, "noise": 1.4 * half}  # fmt: skip
    return row


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean, and half the width of its interval."""
    return float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))

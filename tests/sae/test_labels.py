"""Labels of latents: exact over what was read, from contexts that differ, kept in a file that can be searched."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_chat import WORDS, save_tiny_chat

from steer.core.dictionary import Dictionary
from steer.errors import MismatchError, SteerError, UsageError
from steer.model.steered import SteeredModel, load
from steer.sae.harvest import harvest
from steer.sae.labels import AFTER, BEFORE, label_latents, nearest, spread_rows
from steer.sae.logit_lens import logit_lens
from steer.sae.ranking import Ranking
from steer.sae.records import Context, FeatureRecord, TraitScore, read_records, search, with_trait, write_records
from steer.sae.shards import Harvest

SITE, LATENTS = 1, 70


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("labels") / "chat"))


@pytest.fixture(scope="module")
def text(model: SteeredModel, tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    """Sixty documents that all begin alike, as chats under one system prompt do."""
    place = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    rows = [" ".join(["ba be bi bo", *rng.choice(WORDS, rng.integers(20, 40))]) for _ in range(60)]
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": r}) for r in rows))
    return harvest(model, place / "harvest", sites=[SITE], sources=str(place / "text.jsonl"), shard_tokens=500)


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    torch.manual_seed(0)
    rows = torch.randn(LATENTS, 32) / 32**0.5
    bias = torch.zeros(LATENTS)
    bias[7] = -1e6  # a latent that never fires
    return Dictionary("topk", rows.T.contiguous(), bias, rows, torch.zeros(32), k=6, site=SITE)


@pytest.fixture(scope="module")
def records(model: SteeredModel, dictionary: Dictionary, text: Harvest) -> list[FeatureRecord]:
    return label_latents(model, dictionary, text)


def test_rates_units_and_maxima_are_exact(dictionary: Dictionary, text: Harvest, records: list[FeatureRecord]) -> None:
    acts = dictionary.encode(text.activations(SITE)[torch.arange(text.tokens)]).numpy()
    fired = acts > 0
    assert [r.index for r in records] == np.flatnonzero(fired.any(0)).tolist()
    assert 7 not in {r.index for r in records}
    for r in records:
        positive = acts[fired[:, r.index], r.index]
        assert r.rate == pytest.approx(len(positive) / text.tokens)
        assert r.unit == pytest.approx(np.quantile(positive, 0.99), rel=1e-5)
        assert r.max == pytest.approx(positive.max(), rel=1e-6)


def test_chunks_change_nothing(
    model: SteeredModel, dictionary: Dictionary, text: Harvest, records: list[FeatureRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("steer.sae.labels._CHUNK", 100)
    monkeypatch.setattr("steer.model.forward.AT_ONCE", 30 * LATENTS)
    for a, b in zip(label_latents(model, dictionary, text), records, strict=True):
        assert (a.index, a.rate, a.nearest) == (b.index, b.rate, b.nearest)
        assert a.unit == pytest.approx(b.unit, rel=1e-4)
        assert [c.activation for c in a.contexts] == pytest.approx([c.activation for c in b.contexts], rel=1e-4)


def test_contexts_are_the_text_where_the_latent_fires(
    model: SteeredModel, dictionary: Dictionary, text: Harvest, records: list[FeatureRecord]
) -> None:
    acts = dictionary.encode(text.activations(SITE)[torch.arange(text.tokens)])
    words = [model.tokenizer.decode([i]) for i in text.token_ids.tolist()]
    documents = text.document.tolist()

    def around(at: int) -> tuple[list[str], str, list[str]]:
        window = range(max(0, at - BEFORE), min(len(words), at + AFTER + 1))
        same = [i for i in window if documents[i] == documents[at]]
        return [words[i] for i in same if i < at], words[at], [words[i] for i in same if i > at]

    for r in records:
        for c in r.contexts:
            # Documents that begin alike fire alike, to rounding.
            like = (acts[:, r.index] - c.activation).abs() < 1e-5
            assert (c.before.split(), c.token.strip(), c.after.split()) in map(around, np.flatnonzero(like).tolist())


def test_contexts_begin_at_the_highest_and_come_from_lower_quantiles_too(records: list[FeatureRecord]) -> None:
    often = [r for r in records if r.rate > 0.05]
    assert len(often) > 10
    for r in often:
        values = [c.activation for c in r.contexts]
        assert len(values) == 6
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(r.max)
        assert values[-1] < 0.7 * r.max


def test_no_two_contexts_are_from_one_document_or_read_alike(text: Harvest, records: list[FeatureRecord]) -> None:
    shared = "ba be bi bo"
    assert any(c.before.startswith(shared) for r in records for c in r.contexts)
    for r in records:
        passages = Counter(
            (" ".join(c.before.split()[-4:]), c.token, " ".join(c.after.split()[:2])) for c in r.contexts
        )
        assert max(passages.values()) == 1


def test_tokens_and_neighbours_are_those_of_the_decoder_rows(
    model: SteeredModel, dictionary: Dictionary, records: list[FeatureRecord]
) -> None:
    top, bottom = logit_lens(model, dictionary.W_dec)
    live = {r.index for r in records}
    unit = dictionary.W_dec / dictionary.W_dec.norm(dim=-1, keepdim=True)
    for r in records:
        assert [t for t, _ in r.top_tokens] == [t for t, _ in top[r.index]]
        assert [t for t, _ in r.bottom_tokens] == [t for t, _ in bottom[r.index]]
        near = [i for i in (unit @ unit[r.index]).argsort(descending=True).tolist() if i in live - {r.index}]
        assert [i for i, _ in r.nearest] == near[:5]


def test_fewer_tokens_are_whole_documents_from_all_over_the_text(text: Harvest) -> None:
    document = text.document.numpy()
    rows = spread_rows(document, text.tokens // 3)
    assert 0.2 * text.tokens < len(rows) < 0.5 * text.tokens
    taken = set(document[rows].tolist())
    assert len(rows) == sum(int((document == d).sum()) for d in taken)
    assert min(taken) < 10
    assert max(taken) > 50


def test_a_dense_dictionary_reads_less_text(
    model: SteeredModel, dictionary: Dictionary, text: Harvest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.sae.labels.MOST_FIRINGS", 2 * text.tokens)  # of about six a token
    few = label_latents(model, dictionary, text)
    rates = sum(r.rate for r in few)
    assert rates == pytest.approx(6, abs=0.5)
    assert min(r.rate for r in few) > 1.5 / text.tokens  # shares of fewer tokens are coarser


def test_a_harvest_of_another_width_is_refused(model: SteeredModel, dictionary: Dictionary, text: Harvest) -> None:
    other = Harvest(text.place, text.manifest | {"width": 16})
    with pytest.raises(MismatchError, match=r"width 32.*found 16"):
        label_latents(model, dictionary, other)


def test_a_row_is_not_its_own_neighbour() -> None:
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
    found = nearest(rows, 5)
    assert [[i for i, _ in n] for n in found] == [[1, 2], [0, 2], [1, 0]]
    assert nearest(rows[:1], 5) == [[]]


# The file


def record(index: int, token: str = "tok", auroc: float | None = None, rate: float = 0.01) -> FeatureRecord:
    traits = {} if auroc is None else {"moralizing": TraitScore(auroc, auroc, 0.5, 0.01)}
    return FeatureRecord(
        index, rate, 2.0, 3.0, [(token, 1.5)], [(" low", -1.0)],
        [Context("You should\u2028 be ", "kind", " to \u0085all↵", 3.0)], [(index + 1, 0.25)], traits,
    )  # fmt: skip


def test_what_is_written_is_read_back(tmp_path: Path, records: list[FeatureRecord]) -> None:
    made = [record(0, " Lie"), record(5, auroc=0.9)]
    assert read_records(write_records(tmp_path / "features.jsonl", made)) == made
    again = read_records(write_records(tmp_path / "features.jsonl", records))
    assert again == read_records(write_records(tmp_path / "features.jsonl", again))
    assert [p.name for p in tmp_path.iterdir()] == ["features.jsonl"]


def test_a_row_has_the_fields_that_others_read(tmp_path: Path) -> None:
    row = json.loads(write_records(tmp_path / "f.jsonl", [record(5, auroc=0.12)]).read_text())
    assert list(row)[:4] == ["index", "rate", "unit", "max"]
    assert row["best_trait"] == "moralizing"
    assert row["best_auroc"] == 0.12
    assert row["traits"]["moralizing"] == {"auroc": 0.12, "auroc_max": 0.12, "auroc_mean": 0.5, "q": 0.01}
    assert row["contexts"][0]["token"] == "kind"


def test_an_unfinished_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_records(tmp_path / "features.jsonl", [record(1)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_records(path, [record(2), record(3, rate=float("nan"))])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["features.jsonl"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{not json", "Expecting"),
        ("{}", "no 'index'"),
        ('{"index": "five"}', "'five'"),
        ("[1]", r"\[1\]"),
        ("null", "None"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, found: str) -> None:
    path = write_records(tmp_path / "features.jsonl", [record(1)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(SteerError, match=rf"features\.jsonl, line 2: .*{found}") as e:
        read_records(path)
    assert "\n" not in str(e.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"features\.jsonl.*found no file"):
        read_records(tmp_path / "features.jsonl")


def ranking(auroc: list[float]) -> Ranking:
    a = np.array(auroc)
    return Ranking(a, a, a, a, np.full(len(a), "max"), a, np.full(len(a), 0.02), np.argsort(-a), (1, 1, 1, 1))


def test_a_trait_is_added_by_latent_and_the_best_one_is_the_furthest_from_chance() -> None:
    made = with_trait([record(1, auroc=0.7), record(3)], "compliance", ranking([0.5, 0.2, 0.5, 0.6]))
    assert made[0].traits["compliance"] == TraitScore(0.2, 0.2, 0.2, 0.02)
    assert (made[0].best_trait, made[0].best_auroc) == ("compliance", 0.2)
    assert (made[1].best_trait, made[1].best_auroc) == ("compliance", 0.6)
    assert record(3).best_trait is None


def test_search_wants_every_word_in_tokens_contexts_or_traits() -> None:
    made = [record(0, " Lie"), record(1, " lie lie", auroc=0.6), record(2, " truth", auroc=0.1)]
    assert [r.index for r in search(made, "LIE")] == [1, 0]
    assert [r.index for r in search(made, "lie should")] == [1, 0]
    assert [r.index for r in search(made, "moralizing")] == [1, 2]
    assert search(made, "lie truth") == []
    assert [r.index for r in search(made, limit=2)] == [0, 1]


def test_search_by_trait_goes_by_distance_from_chance() -> None:
    made = [record(0), record(1, auroc=0.6), record(2, auroc=0.1), record(3, auroc=0.8)]
    assert [r.index for r in search(made, trait="moralizing")] == [2, 3, 1, 0]
    with pytest.raises(UsageError, match=r"'candour'.*moralizing"):
        search(made, trait="candour")

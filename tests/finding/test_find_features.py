"""Finding a trait in a dictionary, the whole way on a tiny model: what is chosen, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tiny_chat import WORDS, hooks_on, save_tiny_chat

from steer.checkpoint.library import Library, dictionary_place
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import save_dictionary
from steer.core.feature import Feature
from steer.core.trait import Trait
from steer.errors import MismatchError, SteerError, UsageError
from steer.finding.features import FoundFeatures, find_features
from steer.model.steered import SteeredModel, load
from steer.sae.records import FeatureRecord, read_records, write_records
from steer.verbs.catalogue import catalogue
from steer.verbs.tables import latent_table

pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")

SITE, LATENTS = 1, 64
OTHER = {"name": "kept", "latents": [3], "units": [1.0], "operation": "add", "trait": "other"}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    place = tmp_path_factory.mktemp("found") / "chat"
    return load(save_tiny_chat(tiny_llama, place, max_position_embeddings=512))


@pytest.fixture(scope="module")
def trait() -> Trait:
    """Told by instructions that the model has no choice but to repeat a little: its attention is random."""
    return Trait(
        "lying",
        "s",
        " ".join(["lie"] * 12),
        " ".join(["truth"] * 12),
        ("lie",),
        tuple(f"{w} hello" for w in WORDS[:10]),
        tuple(f"{w} well" for w in WORDS[10:16]),
    )


def dictionary(width: int = 32, site: int | None = SITE) -> Dictionary:
    made = torch.Generator().manual_seed(0)
    rows = torch.randn(LATENTS, width, generator=made)
    rows /= rows.norm(dim=-1, keepdim=True)
    return Dictionary("standard", rows.T.contiguous(), torch.zeros(LATENTS), rows, torch.zeros(width), site=site)


@pytest.fixture(scope="module")
def labelled(model: SteeredModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary's directory with labels for all latents but one, and a slider of another trait."""
    place = tmp_path_factory.mktemp("labelled") / "tiny"
    save_dictionary(dictionary(), place)
    blank = ([("hello", 1.0)], [("yes", -1.0)], [], [])
    write_records(
        place / "features.jsonl", [FeatureRecord(j, 0.1, 0.5 + j / 8, 9.0, *blank) for j in range(LATENTS - 1)]
    )
    (place / "sliders.yaml").write_text(yaml.safe_dump([OTHER, OTHER | {"name": "lying-latent"}]))
    manifest = {"name": "tiny", "site": SITE, "norm": 6.0, "sketch": model.sketch().to_header()}
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def copied(labelled: Path, to: Path) -> Path:
    return Path(shutil.copytree(labelled, to))


@pytest.fixture(scope="module")
def found(model: SteeredModel, trait: Trait, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> FoundFeatures:
    return find_features(model, trait, copied(labelled, tmp_path_factory.mktemp("one") / "tiny"))


@pytest.mark.slow
def test_what_was_found_is_in_the_dictionarys_directory(found: FoundFeatures, labelled: Path) -> None:
    place = found.dictionary.place
    assert place is not None
    assert set(found.written) == {place / "features.jsonl", place / "sliders.yaml", place / "traits" / "lying.json"}
    kept = json.loads((place / "traits" / "lying.json").read_text())
    assert {k: kept[k] for k in found.as_json()} == json.loads(json.dumps(found.as_json()))
    before, after = (read_records(p / "features.jsonl") for p in (labelled, place))
    assert [r.index for r in after] == [r.index for r in before]
    for record in after:
        assert record.traits["lying"].auroc == pytest.approx(found.ranking.auroc[record.index], rel=1e-4)
        assert record.best_trait == "lying"
    assert not [p for p in place.rglob("*") if p.name.startswith(".")]


def test_sliders_of_this_trait_are_replaced_and_others_kept(found: FoundFeatures) -> None:
    assert found.dictionary.place is not None
    rows = yaml.safe_load((found.dictionary.place / "sliders.yaml").read_text())
    assert [r["name"] for r in rows] == ["kept", "lying-latent", "lying-set"]
    assert rows[0] == OTHER
    assert rows[1:] == list(found.sliders)
    assert rows[1]["operation"] == "add"
    assert rows[1]["trait"] == "lying"
    assert 2 <= len(rows[2]["latents"]) <= 5


def test_amount_1_of_a_written_slider_displaces_as_far_as_the_direction(
    found: FoundFeatures, model: SteeredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path))
    assert found.dictionary.place is not None
    copied(found.dictionary.place, dictionary_place(model.sketch(), "tiny"))
    for name in ("lying-latent", "lying-set"):
        feature = Library(model).slider(name).target
        assert isinstance(feature, Feature)
        assert feature.direction.gap == pytest.approx(found.direction.gap, rel=1e-4)
        for index, unit in zip(feature.indices, feature.units, strict=True):
            top = next(t for t in found.top if t.index == index)
            assert unit * top.sign > 0


def test_latents_are_ordered_by_score_and_take_their_unit_from_the_labels(found: FoundFeatures) -> None:
    assert len(found.top) == 10
    ordered = [(t.q >= 0.05, -t.score) for t in found.top]
    assert ordered == sorted(ordered)
    for t in found.top:
        assert t.sign == (1 if t.fit_auroc >= 0.5 else -1)
        if t.index < LATENTS - 1:
            assert t.unit == pytest.approx(0.5 + t.index / 8)


def test_a_sliders_auroc_is_given_in_the_direction_of_the_slider(found: FoundFeatures) -> None:
    row = found.sliders[0]
    (top,) = (t for t in found.top if [t.index] == row["latents"])
    assert row["auroc"] == pytest.approx(top.auroc if top.sign > 0 else 1 - top.auroc, abs=1e-4)


@pytest.mark.slow
def test_the_same_seed_finds_the_same_to_the_digit(
    found: FoundFeatures, model: SteeredModel, trait: Trait, labelled: Path, tmp_path: Path
) -> None:
    again = find_features(model, trait, copied(labelled, tmp_path / "tiny"))
    assert again.as_json() == found.as_json()


def test_without_the_check_nothing_becomes_a_slider(model: SteeredModel, trait: Trait, tmp_path: Path) -> None:
    save_dictionary(dictionary(), tmp_path / "bare")
    found = find_features(model, trait, tmp_path / "bare", check=False)
    assert found.check is None
    assert found.sliders == ()
    assert [p.name for p in found.written] == ["lying.json"]
    assert not (tmp_path / "bare" / "sliders.yaml").exists()
    assert all(t.unit > 0 for t in found.top)
    assert found.dictionary.norm == found.direction.residual_norm
    assert latent_table(found)


def test_a_dictionary_without_a_directory_is_searched_and_nothing_written(model: SteeredModel, trait: Trait) -> None:
    assert find_features(model, trait, dictionary(), check=False).written == ()


def test_the_table_has_every_candidate_and_says_which_wins(found: FoundFeatures) -> None:
    text = latent_table(found)
    assert found.check is not None
    for s in found.check.screened:
        assert s.candidate.name in text
    for dose in found.check.doses:
        assert f"{dose.candidate.name}: {'' if dose.monotone else 'not '}monotone" in text
    assert "held-out topics" in text


def test_a_page_says_which_ranking_is_none_and_leaves_out_figures_that_are_none(labelled: Path, tmp_path: Path) -> None:
    place, page = copied(labelled, tmp_path / "tiny"), tmp_path / "page.html"
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"fit": 3, "spliced": [1], "options": "x"}))
    catalogue(place, html=page)
    assert "held-out FVU" not in page.read_text()
    (place / "traits").mkdir()
    latent = {"index": 1, "auroc": 0.5, "q": 0.1, "attribution": 0.0, "output_score": 0.0, "tokens": [1]}
    for broken in ({"top": [latent]}, {"top": 3}, {"check": {"doses": [], "wins_over_direction": {}}}):
        ranking = {"trait": "lying", "top": [], "direction_auroc": 0.5, "scorer_auroc": 0.5, "check": None}
        (place / "traits" / "lying.json").write_text(json.dumps(ranking | broken))
        with pytest.raises(SteerError, match=r"lying\.json: expected what steer find --dictionary wrote, found "):
            catalogue(place, html=page)


def never(*args: object) -> None:
    pytest.fail("work began before the mistake was found")


@pytest.mark.parametrize(
    ("made", "error", "says"),
    [
        (dictionary(16), MismatchError, "width 16"),
        (dictionary(site=None), UsageError, "site from 0 to 2"),
        (dictionary(site=3), UsageError, "site from 0 to 2"),
    ],
)
def test_another_width_or_no_site_is_refused_before_any_work(
    model: SteeredModel, trait: Trait, made: Dictionary, error: type[SteerError], says: str
) -> None:
    with pytest.raises(error, match=says):
        find_features(model, trait, made, progress=never)  # pyright: ignore[reportArgumentType]


def block_traits(place: Path) -> None:
    (place / "traits").write_text("")


def break_sliders(place: Path) -> None:
    (place / "sliders.yaml").write_text("- [")


def mislabel(place: Path) -> None:
    row = json.loads((place / "features.jsonl").read_text().splitlines()[0])
    (place / "features.jsonl").write_text(json.dumps(row | {"index": LATENTS}) + "\n")


@pytest.mark.parametrize(
    ("breaking", "says"),
    [
        (block_traits, "traits.*could not be written"),
        (break_sliders, "sliders.yaml: expected sliders in YAML"),
        (mislabel, "labels are of another dictionary"),
    ],
)
def test_a_directory_that_cannot_take_the_result_is_refused_before_any_work(
    model: SteeredModel, trait: Trait, labelled: Path, tmp_path: Path, breaking: Callable[[Path], None], says: str
) -> None:
    place = copied(labelled, tmp_path / "tiny")
    breaking(place)
    with pytest.raises(SteerError, match=says) as caught:
        find_features(model, trait, place, progress=never)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


def test_what_is_no_dictionary_is_refused_in_one_line(model: SteeredModel, trait: Trait, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"cfg\.json") as caught:
        find_features(model, trait, tmp_path, progress=never)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_hook_is_left(found: FoundFeatures, model: SteeredModel) -> None:
    assert hooks_on(model) == 0

"""The dictionary that ships: whole, loadable by both libraries, and with a slider for moralizing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from steer.checkpoint.shipped import EFFECTS
from steer.core.dictionary_files import load_dictionary
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.trait import shipped_traits
from steer.sae.records import read_records

PLACE = Path(__file__).parents[1] / "dictionaries" / "smollm2-135m-default-merge" / "14"
DIRECTIONS = sorted((PLACE.parent / "directions").glob("*.safetensors"))


def test_it_is_whole_and_small_enough():
    assert sum(f.stat().st_size for f in PLACE.rglob("*") if f.is_file()) < 40e6
    for name in ("cfg.json", "sae_weights.safetensors", "manifest.json", "features.jsonl", "sliders.yaml", "README.md"):
        assert (PLACE / name).is_file(), name
    d = load_dictionary(PLACE)
    assert d.latents >= 4608
    assert (d.site, d.width) == (14, 576)
    assert len(read_records(PLACE / "features.jsonl")) > 0.95 * d.latents


def test_no_direction_contains_a_path_of_the_machine_that_made_it():
    for file in DIRECTIONS:
        assert not Path(Direction.load(file).provenance["checkpoint"]).is_absolute()


def test_a_trait_ships_a_direction_exactly_if_its_slider_was_measured_to_steer():
    shipped = [p.stem for p in DIRECTIONS]
    assert len(shipped) > 2
    measured = json.loads((PLACE.parent / "directions" / EFFECTS).read_text())
    steers = {
        name for name, s in measured["sliders"].items()
        if name == s["trait"] and (s["verdict"]["says"] == "works" or s["verdict"]["says"].startswith("steers"))
    }  # fmt: skip
    assert set(shipped) == steers | {"compliance", "moralizing"}
    rows = {e["slider"] for e in measured["effects"]}
    assert rows == set(shipped)
    own = [e for e in measured["effects"] if e["slider"] == e["scorer"]]
    assert len(own) == len(shipped)
    assert all(e["change"] > 0 for e in own)
    assert {s["trait"] for s in measured["sliders"].values()} | set(measured["missing"]) == set(shipped_traits())


def test_every_direction_that_ships_has_the_range_that_was_measured_for_its_slider():
    measured = json.loads((PLACE.parent / "directions" / EFFECTS).read_text())["sliders"]
    for file in DIRECTIONS:
        low, high = Direction.load(file).calibrated or (0, 0)
        assert low < 0 < high, file.name
        assert measured[file.stem]["range"] == [low, high]


def test_sae_lens_computes_the_same_from_its_files():
    import sae_lens

    ours, theirs = load_dictionary(PLACE), sae_lens.SAE.load_from_disk(PLACE)
    x = torch.randn(64, ours.width, generator=torch.Generator().manual_seed(0)) * (ours.norm or 1.0) / 24
    with torch.no_grad():
        assert torch.allclose(ours.encode(x), theirs.encode(x), atol=1e-3)
        assert torch.allclose(ours.reconstruct(x), theirs(x), atol=1e-3)
    assert float((ours.encode(x) > 0).sum()) > 0


def test_a_latent_reads_moralizing_and_moves_it_monotonically_on_held_out_topics():
    rows = {r["name"]: r for r in yaml.safe_load((PLACE / "sliders.yaml").read_text())}
    found = json.loads((PLACE / "traits" / "moralizing.json").read_text())
    latent = rows["moralizing-latent"]
    assert latent["auroc"] >= 0.85
    dose = next(d for d in found["check"]["doses"] if d["kind"] == "latent")
    rates = [p["rate"] for p in sorted(dose["points"], key=lambda p: p["amount"])]
    assert rates == sorted(rates)
    assert rates[-1] - rates[0] > 0.5
    assert json.loads((PLACE / "traits" / "compliance.json").read_text())["check"]
    feature = Feature("x", load_dictionary(PLACE), tuple(latent["latents"]), tuple(latent["units"]))
    assert 0.05 < feature.share(1.0) < 0.3

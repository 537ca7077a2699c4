"""A dictionary with labels that the library knows for a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from steer.checkpoint.fetch import home
from steer.checkpoint.library import register_dictionary
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import save_dictionary
from steer.model.steered import SteeredModel
from steer.sae.records import Context, FeatureRecord, TraitScore, write_records

M = 24


def keep_dictionary(model: SteeredModel, name: str = "tiny", site: int = 1) -> Path:
    """Random latents at a site, all but the first few labelled."""
    generator = torch.Generator().manual_seed(4)
    width = model.anatomy.width

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dictionary = Dictionary(
        "jumprelu", rand(width, M) / width**0.5, rand(M) * 0.1, rand(M, width) / width**0.5, rand(width) * 0.1,
        threshold=rand(M).abs() * 0.3, site=site, norm=5.0,
    )  # fmt: skip
    place = home() / "trained" / name
    save_dictionary(dictionary, place)
    words = ["mercy", "sin", "law", "hello", "ships"]
    records = [
        FeatureRecord(
            index=i, rate=0.01 * (i + 1), unit=0.5 + 0.1 * i, max=2.0 + i,
            top_tokens=[(f" {words[i % 5]}", 1.5), (" ...", 1.0)], bottom_tokens=[(" no", -1.0)],
            contexts=[Context("have ", words[i % 5], " on us", 2.0), Context("", words[i % 5], "", 1.0)],
            nearest=[((i + 1) % M, 0.5)] if i + 1 < M else [],
            traits={"moralizing": TraitScore(0.5 + 0.02 * i, 0.5, 0.5, 0.01)},
        )
        for i in range(2, M)
    ]  # fmt: skip
    write_records(place / "features.jsonl", records)
    sliders = [
        {"name": "preach", "latents": [2, 4], "units": [1.0, 2.0], "trait": "moralizing"},
        {"name": "against", "latents": [6], "units": [-1.0], "trait": "moralizing"},
    ]
    (place / "sliders.yaml").write_text(yaml.safe_dump(sliders))
    (place / "traits").mkdir()
    ranking = {"trait": "moralizing", "top": [{"index": 5, "output_score": 0.75}]}
    (place / "traits" / "moralizing.json").write_text(json.dumps(ranking))
    header = {"name": name, "site": site, "norm": 5.0, "sketch": model.sketch().to_header()}
    (place / "manifest.json").write_text(json.dumps(header))
    register_dictionary(place, name, model.sketch())
    return place

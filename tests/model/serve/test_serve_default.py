"""The default model behind the server: a real template, real characters, real speed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from serving import Served, served

from steer.checkpoint.fetch import DEFAULT_MODEL
from steer.core.direction import Direction
from steer.core.profile import Profile
from steer.model.steered import load
from steer.serve.server import Options

pytestmark = pytest.mark.model
GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0}}


@pytest.fixture(scope="module")
def default(tmp_path_factory) -> Iterator[Served]:
    """The default model with a direction that was found by nobody, in a profile."""
    model = load(DEFAULT_MODEL)
    place = tmp_path_factory.mktemp("profiles")
    vector = torch.randn(model.anatomy.width, generator=torch.Generator().manual_seed(0))
    Direction("any", 14, vector / vector.norm(), with_mean=20.0, without_mean=0.0, residual_norm=100.0).save(
        place / "any.safetensors"
    )
    sliders = [{"slider": "any.safetensors", "amount": 4.0}]
    profile = Profile.parse({"name": "far", "sampler": "greedy", "sliders": sliders}, "far", place)
    with served(model, Options(profiles=[profile]), max_running=4) as server:
        yield server


@pytest.mark.slow
def test_a_chat_is_the_models_own_and_a_prefill_goes_on(default):
    name = default.client().models.list().data[0].id
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    said = default.client().chat.completions.create(model=name, messages=asked, max_tokens=24, **GREEDY)
    whole = said.choices[0].message.content
    assert "Paris" in whole
    assert whole == default.model.chat(asked, temperature=0, min_p=0, repetition_penalty=1.0, max_new_tokens=24)
    begun = whole[: whole.index("Paris")].rstrip()
    on = default.client().chat.completions.create(
        model=name, messages=[*asked, {"role": "assistant", "content": begun}], max_tokens=3, **GREEDY
    )
    assert on.choices[0].message.content.startswith(" Paris")


@pytest.mark.slow
def test_characters_of_several_tokens_come_whole_in_a_stream(default):
    """Byte tokens that the model is made to write."""
    tokenizer = default.model.tokenizer
    ids = tokenizer("👩‍👧", add_special_tokens=False).input_ids
    assert len(ids) > 3
    asked = {
        "model": default.client().models.list().data[0].id,
        "prompt": "Emoji: 👩‍👧 👩‍👧 👩‍👧 👩‍👧 👩‍👧",
        "max_tokens": 24,
    }
    chunks = [c.choices[0].text for c in default.client().completions.create(**asked, **GREEDY, stream=True)]
    whole = default.client().completions.create(**asked, **GREEDY).choices[0].text
    assert "".join(chunks) == whole
    assert "👩‍👧" in whole
    assert not any("\ufffd" in c for c in chunks[:-2])


@pytest.mark.slow
def test_a_profile_steers_it_and_shows_how_far(default):
    name = default.client().models.list().data[0].id
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    plain, far = (
        default.client().chat.completions.create(model=m, messages=asked, max_tokens=24, **GREEDY)
        for m in (name, f"{name}@far")
    )
    assert plain.choices[0].message.content != far.choices[0].message.content
    reported = far.model_extra["steering"]
    assert reported["receipt"]["sliders"][0]["mean_share"] == pytest.approx(0.8, abs=0.01)
    assert "fall apart" in reported["warnings"][0]

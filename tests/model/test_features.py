"""What moving a feature does to the residual stream of a running model, by hand and by name."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_chat import hooks_on, keep_direction, logits, residuals, save_tiny_chat
from torch import Tensor

from steer.chat.session import Session
from steer.checkpoint import library
from steer.checkpoint.library import dictionaries_of, dictionary_place
from steer.core.dictionary import Architecture, Dictionary
from steer.core.dictionary_files import save_dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.sampler import Sampler
from steer.core.slider import Slider
from steer.errors import CheckpointError, MismatchError, SkippedWarning, UsageError
from steer.model.decode import decode, generate
from steer.model.fit_check import FitWarning, check_fit
from steer.model.sliders import BUDGET
from steer.model.steered import load

D, M, SITES = 32, 80, range(3)
ROUNDING = 3e-6  # transformers computes norms and softmax in fp32, whatever the weights are
GREEDY = Sampler(max_new_tokens=12, temperature=0, repetition_penalty=1.0)
DRAWN = Sampler(max_new_tokens=14, temperature=1.0, min_p=0.02, repetition_penalty=1.3, seed=3)
PROMPTS = [[1, 4, 20, 33, 5], [1, 4, 71, 5], [1, 3, 9, 8, 7, 6, 4, 50, 5]]
ARCHITECTURES = ["standard", "gated", "jumprelu", "topk", "topk-rescaled"]
pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")


def make(kind: str = "jumprelu", *, seed: int = 0, site: int = 1, width: int = D, **fields: Any) -> Dictionary:
    """A random dictionary whose latents fire on a third of the tokens or less."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    architecture: Architecture = kind.split("-")[0]  # pyright: ignore[reportAssignmentType]
    extra: dict[str, Any] = {
        "standard": {},
        "gated": {"b_mag": rand(M) * 0.2, "r_mag": rand(M) * 0.3},
        "jumprelu": {"threshold": rand(M).abs() * 0.3},
        "topk": {"k": 20, "rescale_by_decoder_norm": kind.endswith("rescaled")},
    }[architecture]
    W_enc, W_dec = rand(width, M) / width**0.5, rand(M, width) / width**0.5
    settings = {"site": site, "norm": 5.0} | extra | fields
    return Dictionary(architecture, W_enc, rand(M) * 0.1, W_dec, rand(width) * 0.1, **settings)


def moves(*each: tuple[Feature, str, float]) -> Edit:
    return Edit(moves=tuple(Slider(f, operation, a) for f, operation, a in each))  # pyright: ignore[reportArgumentType]


def active(dictionary: Dictionary, h: Tensor, n: int = 3) -> list[int]:
    """Latents that are active on some of the tokens and not on others."""
    on = (dictionary.encode(h) > 0).flatten(0, -2).sum(0)
    return [i for i in range(M) if 2 <= int(on[i]) < h[..., 0].numel()][:n]


@pytest.mark.parametrize(("operation", "amount"), [("clamp", 1.5), ("clamp", 0.0), ("scale", 3.0), ("ablate", 0.7)])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_move_changes_the_stream_by_the_activation_it_changes_and_nothing_else(model64, ids, kind, operation, amount):
    dictionary = make(kind)
    before = residuals(model64, ids)
    latents = active(dictionary, before[1])
    feature = Feature("f", dictionary, tuple(latents), (0.5, 1.0, 2.0))
    wide = dictionary.to(dtype=torch.float64)
    acts = wide.encode(before[1])
    a = acts[..., latents]
    units = torch.tensor(feature.units, dtype=torch.float64)
    wanted = {"clamp": amount * units + 0 * a, "scale": amount * a, "ablate": (1 - amount) * a}[operation]
    with model64.steered({Slider(feature, operation): amount}):
        assert hooks_on(model64) == 1
        after = residuals(model64, ids)
    assert torch.equal(after[0], before[0])
    moved = (wanted - a) @ wide.decoder_rows(latents)
    assert float(moved.abs().max()) > 0.05
    torch.testing.assert_close(after[1] - before[1], moved, rtol=0, atol=1e-13)
    # What the dictionary cannot reconstruct is where it was.
    error = before[1] - wide.decode(acts)
    acts[..., latents] = wanted
    torch.testing.assert_close(after[1], wide.decode(acts) + error, rtol=0, atol=1e-12)
    assert not torch.equal(after[2], before[2])


def test_add_moves_every_token_by_amount_times_unit(model64, ids):
    feature = Feature("f", make(), (3, 9), (2.0, -1.0))
    before = residuals(model64, ids)
    with model64.steered({feature: -1.5}):
        after = residuals(model64, ids)
    shift = -1.5 * (2.0 * feature.decoder[0] - feature.decoder[1]).double()
    torch.testing.assert_close(after[1] - before[1], shift.expand(2, 7, D), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_neutral_amounts_are_bit_identical_to_none_and_cost_no_hook(model, ids, kind):
    feature = Feature("f", make(kind), (3, 9), (2.0, 1.0))
    plain = logits(model, ids)
    for operation, neutral in (("add", 0.0), ("ablate", 0.0), ("scale", 1.0)):
        model.sliders.put(Slider(feature, operation), neutral)
        with model.steered({Slider(feature, operation): neutral}):
            assert hooks_on(model) == 0
            assert torch.equal(logits(model, ids), plain)
    model.sliders.put(Slider(feature, "clamp"))
    assert (hooks_on(model), math.isnan(model.sliders["f"])) == (0, True)
    model.sliders["f"] = 0
    assert hooks_on(model) == 1
    del model.sliders["f"]
    assert hooks_on(model) == 0
    assert torch.equal(logits(model, ids), plain)


def test_activations_are_read_before_anything_is_added_at_the_site(model64, moral, ids):
    dictionary = make()
    feature, other = Feature("f", dictionary, (3, 9), (2.0, 1.0)), Feature("o", dictionary, (5,), (1.0,))
    rest = Edit(add=((moral, 1.5),), moves=(Slider(other, "add", 2.0),))
    each = [moves((feature, "clamp", 1.0)), rest]
    both = Edit(moves=(*rest.moves, *each[0].moves))
    before = residuals(model64, ids)[1]
    deltas = []
    for edit in (*each, both):
        with model64.edited(edit):
            deltas.append(residuals(model64, ids)[1] - before)
    torch.testing.assert_close(deltas[2], deltas[0] + deltas[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tokens_with_a_norm_over_ten_times_the_dictionarys_are_left_alone(model, ids, kind):
    before = residuals(model, ids)[1]
    norms = before.norm(dim=-1)
    dictionary = make(kind, norm=float(norms.median()) / 10)
    feature = Feature("f", dictionary, (3, 9), (2.0, 1.0))
    with model.steered({Slider(feature, "clamp"): 1.0}):
        after = residuals(model, ids)[1]
    moved = (after != before).any(-1)
    assert torch.equal(moved, norms <= 10 * dictionary.norm)
    assert 0 < int(moved.sum()) < moved.numel()


@pytest.fixture
def edits(make_direction) -> dict[str, Edit | None]:
    one, topk, late = make(), make("topk", seed=5), make("gated", seed=6, site=2)
    a, b = Feature("a", one, (3, 9), (2.0, 1.0)), Feature("b", one, (9, 11), (1.0, 3.0))
    c, d = Feature("c", topk, (1, 2, 3), (1.0, 1.0, 1.0)), Feature("d", late, (7,), (4.0,))
    mixed = moves((a, "clamp", 1.0), (c, "scale", 2.0), (d, "clamp", 1.5), (b, "add", -1.0))
    return {
        "none": None,
        "clamp": moves((a, "clamp", 1.5)),
        "other latents": moves((b, "scale", 4.0), (a, "add", 0.5)),
        "other dictionary": moves((c, "clamp", 2.0)),
        "mixed": Edit((make_direction(),), 0.5, None, ((make_direction("x", seed=9), 1.0),), mixed.moves),
        "direction": Edit(add=((make_direction(), 1.0),)),
    }


def test_rows_may_move_features_of_their_own(model64, ids, edits):
    ids = ids[:1].repeat(len(edits), 1)
    plain = residuals(model64, ids[:1])
    with model64.steering.applied(list(edits.values())):
        together = residuals(model64, ids)
    for row, edit in enumerate(edits.values()):
        with model64.steering.applied([edit]):
            alone = residuals(model64, ids[:1])
        for site in SITES:
            torch.testing.assert_close(together[site][row], alone[site][0], rtol=0, atol=ROUNDING)
        assert (edit is None) == torch.equal(alone[2], plain[2])
    assert hooks_on(model64) == 0


@pytest.mark.parametrize("kind", ["clamp", "other dictionary", "mixed"])
def test_cached_decoding_is_the_full_forward(endless, edits, kind):
    prompt = PROMPTS[0]
    with torch.inference_mode(), endless.edited(edits[kind]):
        with endless.record() as cached:
            made = generate(endless, [prompt], GREEDY)[0]
        with endless.record() as full:
            logits = endless.hf(input_ids=torch.tensor([prompt + made])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == made
    for site in SITES:
        torch.testing.assert_close(torch.cat(cached.passes(site), 1), full[site][:, :-1], rtol=0, atol=ROUNDING)


def test_rows_that_leave_the_batch_change_no_other_and_each_is_as_alone(endless, edits):
    rows = [(p, e) for p in PROMPTS for e in edits.values()]
    prompts, each = [p for p, _ in rows], [e for _, e in rows]
    with endless.steering.applied(each):
        whole = generate(endless, prompts, DRAWN)
    for key, (prompt, edit) in enumerate(rows):
        with endless.steering.applied([edit]):
            assert generate(endless, [prompt], DRAWN, [key])[0] == whole[key]
    where = {t: {r.index(t) for r in whole if t in r} for t in range(97)}
    end = max(where, key=lambda t: len(where[t]) * any(t not in r for r in whole))
    assert len(where[end]) > 1
    endless.end_token_ids = frozenset([end])
    with endless.steering.applied(each):
        assert generate(endless, prompts, DRAWN) == [r[: r.index(end)] if end in r else r for r in whole]


def test_what_is_applied_for_a_moment_disturbs_no_batch_that_is_being_written(endless, edits):
    each, sampler = list(edits.values())[:3], replace(DRAWN, max_new_tokens=40)
    endless.end_token_ids = frozenset(range(60, 70))
    with endless.steering.applied(each):
        quiet = [s.tokens for s in decode(endless, PROMPTS, sampler)]
        steps = []
        for step in decode(endless, PROMPTS, sampler):
            steps.append(step.tokens)
            with endless.edited(edits["clamp"]):
                pass
    assert len(quiet[-1]) < 3
    assert steps == quiet


def test_a_bf16_model_is_moved_in_fp32_and_rounded_once(chat_checkpoint, ids):
    model = load(chat_checkpoint, dtype=torch.bfloat16)
    dictionary = make().to(dtype=torch.bfloat16)
    feature = Feature("f", dictionary, (3, 9), (2.0, 1.0))
    before = residuals(model, ids)[1]
    with model.steered({Slider(feature, "clamp"): 1.0}):
        after = residuals(model, ids)[1]
    a = dictionary.encode(before)[..., [3, 9]]
    exact = before.float() + (torch.tensor([2.0, 1.0]) - a) @ dictionary.decoder_rows([3, 9])
    torch.testing.assert_close(after, exact.to(torch.bfloat16), rtol=2**-8, atol=0)
    assert float((after == exact.to(torch.bfloat16)).float().mean()) > 0.98


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_changing_an_amount_copies_no_row_and_registers_no_hook(model, ids, kind):
    session = Session(model, sampler=Sampler(max_new_tokens=4))
    dictionary = make(kind).to(dtype=torch.bfloat16)
    session.sliders.put(Slider(Feature("f", dictionary, (3,), (2.0,)), "clamp"), 1.0)
    list(session.reply("hello"))
    made = dict(dictionary.placed)
    assert made
    session.sliders["f"] = 0.5
    list(session.reply("well"))
    assert dict(dictionary.placed) == made  # the same objects: what is placed has no equality but identity
    assert hooks_on(model) == 0


def test_adds_and_clamps_count_towards_the_budget(model):
    dictionary = make(norm=2.0)
    f = Feature("f", dictionary, (3,), (1.0,))
    f = replace(f, units=(1.0 / float(f.decoder.norm()),))  # amount 1 is half of the norm
    model.sliders.put(f, -1.0)
    assert model.sliders.share(1) == pytest.approx(0.5)
    model.sliders.put(
        Slider(
            replace(replace(f, indices=(5,), units=(1.0 / float(dictionary.decoder_rows((5,)).norm()),)), name="g"),
            "clamp",
        ),
        0.1,
    )
    assert model.sliders.share(1) == pytest.approx(0.55)
    del model.sliders["g"]
    assert model.sliders.warnings() == []
    model.sliders["f"] = 2 * BUDGET + 0.1
    assert "after block 1 by 0.85" in model.sliders.warnings()[0]


def test_two_sliders_that_read_one_latent_are_refused_and_the_first_stays(model, ids):
    dictionary = make()
    model.sliders.put(Slider(Feature("f", dictionary, (3, 4), (1.0, 1.0)), "clamp"), 1.0)
    before = logits(model, ids)
    with pytest.raises(UsageError, match="'f' and 'g'"):
        model.sliders.put(Slider(Feature("g", dictionary, (4,), (1.0,)), "ablate"), 1.0)
    assert dict(model.sliders) == {"f": 1.0}
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [({"width": 64}, MismatchError, r"width 64.*width 32"), ({"site": 3}, UsageError, "site from 0 to 2")],
)
def test_a_feature_that_does_not_fit_changes_nothing(model, ids, bad, error, message):
    plain, feature = logits(model, ids), Feature("f", make(**bad), (3,), (1.0,))
    with pytest.raises(error, match=message):
        model.sliders.put(feature, 1.0)
    with pytest.raises(error, match=message), model.steered({Slider(feature, "clamp"): 1.0}):
        pass
    with pytest.raises(error, match=message):
        check_fit(model, feature.dictionary)
    assert (len(model.sliders), hooks_on(model)) == (0, 0)
    assert torch.equal(logits(model, ids), plain)


# By name


Keep = Callable[..., Path]


@pytest.fixture
def keep(chat_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keep:
    """Puts a dictionary where the library finds it, under a separate STEER_HOME."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(library, "DICTIONARIES", tmp_path / "shipped")

    def put(dictionary: Dictionary, name: str = "tiny", *, checkpoint: Path | None = None, **manifest: Any) -> Path:
        sketch = load(checkpoint or chat_checkpoint).sketch()
        place = dictionary_place(sketch, name)
        save_dictionary(dictionary, place)
        rows = [{"index": i, "unit": 1.0 + i} for i in range(0, M, 2)]
        (place / "features.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        sliders = [
            {"name": "preach", "latents": [2, 4], "units": [1.0, 2.0], "operation": "clamp", "trait": "moralizing"},
            {"name": "sum", "latents": [6], "units": [1.0]},
        ]
        (place / "sliders.yaml").write_text(yaml.safe_dump(sliders))
        header = {"name": name, "site": dictionary.site, "norm": dictionary.norm, "sketch": sketch.to_header()}
        (place / "manifest.json").write_text(json.dumps(header | manifest))
        return place

    return put


def test_sliders_that_come_with_a_dictionary_are_moved_by_name(model64, ids, keep):
    dictionary = make()
    place = keep(dictionary)
    assert dictionaries_of(model64.sketch()) == {"tiny": place}
    assert {n: s.operation for n, s in model64.sliders.known().items()} == {"preach": "clamp", "sum": "add"}
    by_hand = moves((Feature("p", dictionary, (2, 4), (1.0, 2.0)), "clamp", 1.0))
    with model64.edited(by_hand):
        wanted = logits(model64, ids)
    model64.sliders["preach"] = 1.0
    assert torch.equal(logits(model64, ids), wanted)
    model64.sliders.reset()
    with model64.steered({"preach": 1.0}):
        assert torch.equal(logits(model64, ids), wanted)
    assert hooks_on(model64) == 0


def test_any_live_latent_is_moved_by_its_site_and_number(model, keep):
    keep(make())
    slider = model.sliders.slider("L1/8")
    assert isinstance(slider.target, Feature)
    assert (slider.target.indices, slider.target.units, slider.operation) == ((8,), (9.0,), "add")
    assert slider.target.dictionary is model.sliders.slider("preach").target.dictionary
    with pytest.raises(UsageError, match=r"latent 7.*never fired"):
        model.sliders["L1/7"] = 1.0
    with pytest.raises(UsageError, match=r"at site 2, found tiny at site 1"):
        model.sliders["L2/8"] = 1.0


def test_a_latent_is_found_beside_a_dictionary_that_cannot_be_read(model, keep):
    broken = keep(make()).parent / "a-broken"
    broken.mkdir()
    (broken / "manifest.json").write_text(json.dumps({"name": "broken", "sketch": model.sketch().to_header()}))
    (broken / "sae_weights.safetensors").write_bytes(b"x")
    with pytest.warns(SkippedWarning, match="a-broken"):
        assert model.sliders.slider("L1/8").target.indices == (8,)


def test_a_direction_goes_before_a_feature_of_the_same_name(model, keep, chat_checkpoint, make_direction):
    keep(make())
    keep_direction(chat_checkpoint, make_direction("sum"))
    assert not isinstance(model.sliders.slider("sum").target, Feature)
    assert list(model.sliders.known()) == ["sum", "preach"]
    with pytest.raises(UsageError, match=r"found sum, preach; make it with: steer find \S+ kindness"):
        model.sliders["kindness"] = 1.0


def test_a_dictionary_of_another_checkpoint_is_not_known(model, keep, tiny_llama, tmp_path):
    keep(make(), checkpoint=save_tiny_chat(tiny_llama, tmp_path / "other", seed=5))
    assert dictionaries_of(model.sketch()) == {}
    assert model.sliders.known() == {}


def test_the_manifests_alone_list_the_dictionaries(model, keep):
    place = keep(make())
    (place / "sae_weights.safetensors").write_bytes(b"")
    assert list(dictionaries_of(model.sketch())) == ["tiny"]
    with pytest.raises(CheckpointError, match=r"sae_weights\.safetensors"):
        model.sliders["preach"] = 1.0


BROKEN = ["{", "- name: x", "- {name: x, latents: [1], units: []}", "name: x", "- 3", "a: &a [*a]", "[" * 10**5]


@pytest.mark.slow
@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_list_of_sliders_is_passed_over_with_one_warning_that_names_it(model, keep, text):
    place = keep(make())
    (place / "sliders.yaml").write_text(text)
    with pytest.warns(SkippedWarning, match=r"sliders\.yaml: .*expected") as caught:
        assert model.sliders.known() == {}
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    model.sliders["L1/8"] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(model.sliders.known()) == ["L1/8"]


def test_one_broken_file_among_many_stops_nobody(model, keep, chat_checkpoint, make_direction):
    place = keep(make())
    good = keep_direction(chat_checkpoint, make_direction("good"))
    folder, cases = good.parent, {}
    for number, data in enumerate((b"", b"{}", b"\xff" * 99, good.read_bytes()[:-9], b"\x01" + bytes(7) + b"[")):
        (file := folder / f"a{number}.safetensors").write_bytes(data)
        cases[file] = str(file)
    for number, provenance in enumerate(({"sketch": "A"}, {"sketch": "QUJD"}, {"sketch": 3})):
        file = replace(make_direction("bad"), provenance=provenance).save(folder / f"b{number}.safetensors")
        cases[file] = str(file)
    for number, text in enumerate(('{"name": "x"', "[]", "[" * 10**5, '{"sketch": {}}', "\xff")):
        (other := place.parent / f"torn{number}").mkdir()
        (other / "manifest.json").write_text(text, encoding="latin-1")
        cases[other] = str(other)
    with pytest.warns(SkippedWarning) as caught:
        assert list(model.sliders.known()) == ["good", "preach", "sum"]
    lines = [str(w.message) for w in caught]
    assert len(lines) == len(cases)
    for name in cases.values():
        assert sum(name in text for text in lines) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sliders["good"] = 1.0


def test_many_names_are_looked_up_by_reading_the_library_once(
    model, keep, chat_checkpoint, make_direction, monkeypatch
):
    keep(make())
    for number in range(5):
        keep_direction(chat_checkpoint, make_direction(f"d{number}", seed=number + 1))
    reads = []
    listed = library.direction_files
    monkeypatch.setattr(library, "direction_files", lambda: reads.append(1) or listed())
    model.sliders.replace({"d0": 1.0, "d1": 1.0, "d2:ablate": 1.0, "preach": 1.0, "L1/8": 1.0})
    assert reads == [1]


def test_files_that_did_not_change_are_not_read_again(model, keep, chat_checkpoint, make_direction, monkeypatch):
    """The page lists the sliders at every click."""
    keep(make())
    for number in range(3):
        keep_direction(chat_checkpoint, make_direction(f"d{number}", seed=number + 1))
    loaded, load = [], Direction.load
    monkeypatch.setattr(Direction, "load", lambda path: loaded.append(path.stem) or load(path))
    for _ in range(3):
        assert {"d0", "d1", "d2"} <= model.sliders.known().keys()
    assert [loaded.count(f"d{number}") for number in range(3)] == [1, 1, 1]
    keep_direction(chat_checkpoint, make_direction("d1", seed=9))
    model.sliders.known()
    assert [loaded.count(f"d{number}") for number in range(3)] == [1, 2, 1]


# Fit


def mirror(**fields: Any) -> Dictionary:
    """A dictionary that reconstructs everything: relu(x) - relu(-x)."""
    eye = torch.eye(D)
    zeros = torch.zeros(2 * D)
    return Dictionary("standard", torch.cat([eye, -eye], 1), zeros, torch.cat([eye, -eye]), zeros[:D], site=1, **fields)


def test_a_poor_fit_warns_once_with_the_figures_and_a_good_one_does_not(model):
    good, poor = mirror(), make(manifest={"name": "foreign", "fit": {"fvu": 0.2}})
    assert check_fit(model, good).fit.fvu < 1e-9
    report = check_fit(model, poor)
    assert report.poor
    assert report.reference == 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sliders.put(Feature("g", good, (3,), (1.0,)), 1.0)
        model.sliders.put(Slider(Feature("p", poor, (3,), (1.0,)), "clamp"))  # moves nothing yet
    with pytest.warns(FitWarning, match=rf"'foreign' on .*{report.fit.fvu:.2f} of the variance.*own is 0\.20"):
        model.sliders["p"] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sliders["p"] = 2.0
        with model.steered({Slider(Feature("q", poor, (4,), (1.0,)), "ablate"): 1.0}):
            pass


@pytest.mark.parametrize(
    ("manifest", "poor"),
    [
        ({"fit": {"fvu": 0.0}}, False),
        ({"fit_on_plain": {"fvu": 0.0}, "fit": {"fvu": 9.0}}, False),
        ({}, False),
        ({"fit": {"fvu": -0.2}}, True),
    ],
)
def test_a_fit_is_held_against_the_dictionarys_own(model, manifest, poor):
    assert check_fit(model, mirror(manifest=manifest)).poor is poor


def test_the_fit_is_of_the_model_itself_on_all_its_prose_whatever_the_sliders(model, moral, ids):
    dictionary = make()
    report = check_fit(model, dictionary)
    assert report.fit.tokens > 1000
    model.sliders.put(moral, 3.0)
    steered, hooks = logits(model, ids), hooks_on(model)
    assert check_fit(model, dictionary) == report
    assert hooks_on(model) == hooks
    assert torch.equal(logits(model, ids), steered)

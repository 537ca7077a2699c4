"""The same logits from `model.steered`, from hooks on a plain transformers model, and from a TransformerBridge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import hooks_on, save_tiny_chat
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.profile import GateSpec, Profile, ProfileSlider, ScheduleSpec
from steer.core.schedule import Gate, Schedule
from steer.core.slider import Slider
from steer.errors import MismatchError, SteerError, UsageError
from steer.model import attention
from steer.model.steered import SteeredModel, load

SITES = range(3)
ROUNDING = 3e-6  # transformers computes norms and softmax in fp32, whatever the weights are
KINDS = ["add", "ablate", "ablate in part", "clamp", "cap", "scale", "feature", "feature clamp"]
TIMED = ["reply", "ramp"]
KINDS += [*TIMED, "gate", "together"]
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")


def dictionary(*, site: int = 1, width: int = 32, latents: int = 64) -> Dictionary:
    """A random JumpReLU dictionary whose latents fire on some of the tokens."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Dictionary(
        "jumprelu", rand(width, latents) / width**0.5, rand(latents) * 0.1, rand(latents, width) / width**0.5,
        rand(width) * 0.1, threshold=rand(latents).abs() * 0.3, site=site, norm=5.0,
    )  # fmt: skip


def sliders(kind: str, make: Callable[..., Direction]) -> dict[Any, float]:
    """One way to steer, by name."""
    moral, other, early = make("moral"), make("other", seed=8), make("early", site=0, seed=9)
    feature = Feature("f", dictionary(), (3, 9, 11), (1.0, 2.0, 0.5))
    reply = Schedule(part="reply")
    return {
        "add": {moral: -1.5, early: 0.5},
        "ablate": {Slider(moral, "ablate"): 1.0, Slider(other, "ablate"): 1.0},
        "ablate in part": {Slider(moral, "ablate"): 0.4},
        "clamp": {Slider(moral, "clamp"): 1.5, Slider(other, "clamp"): -1.0},
        "cap": {Slider(moral, "cap"): 0.0},
        "scale": {Slider(early, "scale"): 3.0},
        "feature": {feature: 1.0},
        "feature clamp": {Slider(feature, "clamp"): 1.0},
        "reply": {Slider(moral, "add", reply): 2.0, Slider(feature, "clamp", reply): 1.0},
        "ramp": {Slider(moral, "clamp", Schedule(after=1, ramp=3)): 1.0, Slider(moral, "ablate", reply): 0.5},
        "gate": {Slider(moral, "add", Schedule(gate=Gate(early, above=0.3))): 2.0},
        "together": {moral: 0.5, Slider(other, "ablate"): 0.5, Slider(early, "cap"): 0.1, Slider(feature, "scale"): 2},
    }[kind]


@contextmanager
def hooked(hf: Any, pairs: list[tuple[str, Any]]) -> Iterator[None]:
    handles = [hf.get_submodule(name).register_forward_hook(hook) for name, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def logits(hf: Any, ids: Tensor, pairs: list[tuple[str, Any]] | None = None, **kwargs: Any) -> Tensor:
    with hooked(hf, pairs or []):
        return hf(input_ids=ids, **kwargs).logits


@torch.inference_mode()
def steered(model: SteeredModel, amounts: dict[Any, float], ids: Tensor) -> Tensor:
    with model.steered(amounts):
        return model.hf(input_ids=ids).logits


@pytest.fixture
def plain64(chat_checkpoint: Path) -> Any:
    """The checkpoint as transformers loads it, in fp64, with the attention that `load` takes on a CPU."""
    hf = AutoModelForCausalLM.from_pretrained(chat_checkpoint, dtype=torch.float64, attn_implementation=attention.NAME)
    return hf.eval()


@pytest.fixture(scope="module")
def bridge(chat_checkpoint: Path) -> TransformerBridge:
    """The checkpoint in TransformerLens, in fp64."""
    return boot(chat_checkpoint)


def boot(checkpoint: Path, dtype: torch.dtype = torch.float64) -> TransformerBridge:
    return TransformerBridge.boot_transformers(str(checkpoint), device="cpu", dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_model_with_the_hooks_says_what_the_steered_one_says(model64, plain64, make_direction, ids, kind):
    amounts = sliders(kind, make_direction)
    untouched, wanted = logits(plain64, ids), steered(model64, amounts, ids)
    assert float((wanted - untouched).abs().max()) > 0.05
    torch.testing.assert_close(logits(plain64, ids, model64.hooks(amounts)), wanted, rtol=0, atol=1e-10)
    assert torch.equal(logits(plain64, ids), untouched)
    assert hooks_on(model64) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_bridge_with_the_hooks_says_what_the_steered_model_says(model64, bridge, make_direction, ids, kind):
    amounts = sliders(kind, make_direction)
    hooks = model64.transformer_lens_hooks(amounts, bridge)
    with torch.inference_mode():
        untouched, found = bridge(ids), bridge.run_with_hooks(ids, fwd_hooks=hooks)
        alone = bridge.run_with_hooks(ids[:1], fwd_hooks=hooks, remove_batch_dim=True)
        assert torch.equal(bridge(ids), untouched)
    wanted = steered(model64, amounts, ids)
    assert float((wanted - untouched).abs().max()) > 0.05
    torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(alone, wanted[:1], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["add", "ablate in part", "together", "reply"])
def test_hooks_hold_in_compatibility_mode_too_where_norms_are_folded(
    chat_checkpoint, model64, make_direction, ids, kind
):
    folded = boot(chat_checkpoint)
    folded.enable_compatibility_mode(disable_warnings=True)
    amounts = sliders(kind, make_direction)
    with torch.inference_mode():
        found = folded.run_with_hooks(ids, fwd_hooks=model64.transformer_lens_hooks(amounts, folded))
    # The logits of a folded model are centred.
    torch.testing.assert_close(found.log_softmax(-1), steered(model64, amounts, ids).log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2", "Qwen3"])
def test_every_architecture_says_the_same_three_times_in_fp32(tiny_llama, tmp_path, make_direction, ids, architecture):
    place = save_tiny_chat(tiny_llama, tmp_path / "checkpoint", by_bytes=True, architecture=architecture)
    model, other = load(place), boot(place, torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(place).eval()
    for kind in ("together", "reply"):
        amounts = sliders(kind, make_direction)
        wanted = steered(model, amounts, ids)
        torch.testing.assert_close(logits(plain, ids, model.hooks(amounts)), wanted, rtol=0, atol=2e-5)
        with torch.inference_mode():
            found = other.run_with_hooks(ids, fwd_hooks=model.transformer_lens_hooks(amounts, other))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["together", "gate", "reply"])
def test_a_recording_holds_what_the_cache_of_transformer_lens_holds(model64, bridge, make_direction, ids, kind):
    amounts = sliders(kind, make_direction)
    with torch.inference_mode():
        with model64.steered(amounts), model64.record() as ours:
            model64.hf(input_ids=ids)
        with bridge.hooks(fwd_hooks=model64.transformer_lens_hooks(amounts, bridge)):
            _, theirs = bridge.run_with_cache(ids)
    for site in SITES:
        torch.testing.assert_close(ours[site], theirs[f"blocks.{site}.hook_resid_post"], rtol=0, atol=ROUNDING)


# What hooks are made of


def test_a_profile_its_file_an_edit_and_amounts_by_name_make_the_same_hooks(
    model64, plain64, known_moral, make_direction, tmp_path, ids
):
    make_direction("other", site=0, seed=8).save(tmp_path / "other.safetensors")
    profile = Profile(
        "noir",
        sliders=(
            ProfileSlider(
                "moral", -1.5, when=ScheduleSpec(part="reply", gate=GateSpec("other.safetensors", above=-9.0))
            ),
            ProfileSlider("other.safetensors", 1.0, "clamp"),
            ProfileSlider("moral", 0.5),
            ProfileSlider("moral", 4.0, "scale", enabled=False),
        ),
        folder=tmp_path,
    )
    moral = model64.sliders.slider("moral").target
    other = Direction.load(tmp_path / "other.safetensors")
    late = Schedule(part="reply", gate=Gate(other, above=-9.0))
    amounts = {Slider(moral, "add", late): -1.5, Slider(other, "clamp"): 1.0, "moral": 0.5}
    wanted = steered(model64, amounts, ids)
    assert float((wanted - logits(plain64, ids)).abs().max()) > 0.05
    edit = Edit.of([(k if isinstance(k, Slider) else Slider(moral)).at(a) for k, a in amounts.items()])
    for what in (profile, profile.save(tmp_path / "noir.yaml"), str(tmp_path / "noir.yaml"), edit, amounts):
        torch.testing.assert_close(logits(plain64, ids, model64.hooks(what)), wanted, rtol=0, atol=1e-12)
    model64.sliders["moral"] = 1.0
    live = model64.hooks(model64.sliders)
    model64.sliders["moral"] = -3.0  # felt by the model, not by hooks that were made before
    torch.testing.assert_close(logits(plain64, ids, live), steered(model64, {"moral": 1.0}, ids), rtol=0, atol=1e-12)


def test_what_moves_nothing_has_no_hook(model, moral, known_moral):
    off = ProfileSlider("moral", 2.0, enabled=False)
    for what in ({}, {moral: 0.0, Slider(moral, "scale"): 1.0}, Profile("none"), Profile("off", sliders=(off,))):
        assert model.hooks(what) == []
        assert model.transformer_lens_hooks(what) == []


def test_only_what_waits_for_the_reply_counts_positions(model, moral):
    assert [name for name, _ in model.hooks({moral: 1.0})] == ["model.layers.1"]
    later = {Slider(moral, "add", Schedule(part="reply")): 1.0}
    assert [name for name, _ in model.hooks(later)] == ["model.embed_tokens", "model.layers.1"]
    assert [name for name, _ in model.transformer_lens_hooks(later)] == ["hook_embed", "blocks.1.hook_resid_post"]
    everywhere = [name for name, _ in model.transformer_lens_hooks({Slider(moral, "ablate"): 1.0})]
    assert everywhere == ["hook_embed", *(f"blocks.{b}.hook_{m}_out" for b in SITES for m in ("attn", "mlp"))]


# Positions


@pytest.mark.parametrize("kind", ["add", "clamp", *TIMED])
def test_generate_with_the_hooks_and_a_cache_makes_the_logits_of_the_steered_model(
    model64, plain64, make_direction, ids, kind
):
    amounts = sliders(kind, make_direction)
    settings: Any = GREEDY | {"max_new_tokens": 6, "min_new_tokens": 6}
    for _ in range(2):  # the second text begins anew
        with torch.inference_mode():
            with model64.steered(amounts):
                wanted = model64.hf.generate(ids, **settings)
            with hooked(plain64, model64.hooks(amounts)):
                found = plain64.generate(ids, **settings)
            free = plain64.generate(ids, **settings)
        assert torch.equal(found.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=0, atol=1e-10)
        assert float((torch.stack(free.logits) - torch.stack(found.logits))[0].abs().max()) > 0.05


@pytest.mark.parametrize("kind", TIMED)
def test_one_list_serves_text_after_text_and_rows_that_are_padded_on_the_left(model64, plain64, make_direction, kind):
    amounts = sliders(kind, make_direction)
    prompts = [[9, 20, 33, 12, 60], [44, 8, 71]]
    settings: Any = GREEDY | {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    with torch.inference_mode(), hooked(plain64, model64.hooks(amounts)):
        each = [plain64.generate(torch.tensor([p]), **settings) for p in prompts]
        padded = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
        both = plain64.generate(padded, attention_mask=(padded > 0).long(), **settings)
    for row, alone in enumerate(each):
        assert both.sequences[row, 5:].tolist() == alone.sequences[0, len(prompts[row]) :].tolist()
        for together, single in zip(both.logits, alone.logits, strict=True):
            torch.testing.assert_close(together[row], single[0], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", TIMED)
def test_a_reply_start_makes_one_pass_over_prompt_and_reply_say_what_decoding_said(
    model64, plain64, bridge, make_direction, ids, kind
):
    amounts = sliders(kind, make_direction)
    settings: Any = GREEDY | {"max_new_tokens": 6, "min_new_tokens": 6}
    with torch.inference_mode(), hooked(plain64, model64.hooks(amounts)):
        made = plain64.generate(ids, **settings)
    wanted, whole = torch.stack(made.logits, 1).double(), made.sequences[:, :-1]
    found = logits(plain64, whole, model64.hooks(amounts, reply_start=7), use_cache=False)
    torch.testing.assert_close(found[:, 6:], wanted, rtol=0, atol=ROUNDING)
    with torch.inference_mode():
        lens = bridge.run_with_hooks(whole, fwd_hooks=model64.transformer_lens_hooks(amounts, bridge, reply_start=7))
    torch.testing.assert_close(lens[:, 6:], wanted, rtol=0, atol=ROUNDING)
    assert float((logits(plain64, whole, model64.hooks(amounts)) - found)[:, 6:].abs().max()) > 0.05


def test_the_reply_begins_at_the_last_token_before_it_in_every_row(model64, plain64, moral, ids):
    amounts = {Slider(moral, "add", Schedule(part="reply")): 1.0}
    shift = moral.gap * moral.vector.double()
    with torch.inference_mode(), model64.record([1]) as before:
        model64.hf(input_ids=ids)
    kept: list[Tensor] = []
    pairs = [*model64.hooks(amounts, reply_start=[3, 6]), ("model.layers.1", lambda m, a, o: kept.append(o))]
    logits(plain64, ids, pairs)
    for row, start in enumerate((3, 6)):
        assert torch.equal(kept[0][row, : start - 1], before[1][row, : start - 1])
        assert torch.equal(kept[0][row, start - 1 :], before[1][row, start - 1 :] + shift)


@pytest.mark.parametrize("kind", ["add", "clamp", *TIMED])
def test_a_bridge_that_generates_with_its_cache_is_steered_like_the_model(model64, bridge, make_direction, ids, kind):
    amounts = sliders(kind, make_direction)
    with torch.inference_mode():
        with model64.steered(amounts):
            wanted = model64.hf.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        with bridge.hooks(fwd_hooks=model64.transformer_lens_hooks(amounts, bridge)):
            found = bridge.generate(ids, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
        free = bridge.generate(ids, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    assert found.tolist() == wanted.tolist()
    assert free.tolist() != wanted.tolist()


# Gradients and errors


@pytest.mark.parametrize("kind", ["add", "clamp", "feature clamp"])
def test_gradients_flow_through_hooks(model64, plain64, make_direction, ids, kind):
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    with hooked(plain64, [("model.layers.0", keep), *model64.hooks(sliders(kind, make_direction))]):
        plain64(input_ids=ids).logits[:, -1, 7].sum().backward()
    assert kept[0].grad is not None
    assert float(kept[0].grad.abs().max()) > 0


def test_embeddings_in_place_of_tokens_are_refused_where_positions_matter(model64, plain64, moral, ids):
    embeds = plain64.get_input_embeddings()(ids)
    pairs = model64.hooks({Slider(moral, "add", Schedule(part="reply")): 1.0})
    for _ in range(2):
        with pytest.raises(UsageError, match="pass input_ids, not inputs_embeds"), hooked(plain64, pairs):
            plain64(inputs_embeds=embeds)
        logits(plain64, ids[:, :4], pairs)  # counts 4 positions, not the 7 that come next
    with hooked(plain64, model64.hooks({moral: 1.0})):
        assert plain64(inputs_embeds=embeds).logits.shape[:2] == (2, 7)


def test_what_does_not_fit_the_model_makes_no_hooks(model, make_direction, tmp_path):
    wide, late = make_direction("wide", width=64), make_direction("late", site=3)
    bad: list[tuple[Any, type[SteerError], str]] = [
        ({wide: 1.0}, MismatchError, "width 64"),
        (Edit(add=((late, 1.0),)), UsageError, "site from 0 to 2"),
        ({"nobody": 1.0}, UsageError, "nobody"),
        (tmp_path / "absent.yaml", SteerError, "absent.yaml"),
        (Profile("p", sliders=(ProfileSlider("nobody", 1.0),)), UsageError, "nobody"),
        (["moral"], UsageError, "found list"),
    ]
    for what, error, said in bad:
        for make in (model.hooks, model.transformer_lens_hooks):
            with pytest.raises(error, match=said) as caught:
                make(what)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [0, -1, 2.5, True, [], [3, 0], "3"])
def test_a_reply_that_begins_nowhere_is_refused(model, moral, start):
    with pytest.raises(UsageError, match="reply_start"):
        model.hooks({moral: 1.0}, reply_start=start)


def test_a_bridge_of_another_model_is_refused(model, moral, bridge, tiny_llama, tmp_path):
    small = boot(save_tiny_chat(tiny_llama, tmp_path / "small", num_hidden_layers=2))
    with pytest.raises(MismatchError, match=r"3 blocks of width 32 .* found 2 of width 32"):
        model.transformer_lens_hooks({moral: 1.0}, small)
    assert len(model.transformer_lens_hooks({moral: 1.0}, bridge)) == 1

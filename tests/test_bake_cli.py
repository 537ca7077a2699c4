"""`steer bake` in all its forms: what it says, what it writes, and what `steer verify` makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Command, command_here
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from tiny_chat import keep_direction, save_tiny_chat
from transformers.utils.logging import disable_progress_bar

from steer.baking.certificate import CONTROL_VECTOR as FILE
from steer.baking.certificate import Certificate
from steer.baking.plan import bakeable
from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.reader import ADAPTER, CheckpointFiles
from steer.checkpoint.sketch import sketch_files
from steer.core.direction import Direction
from steer.core.method import Kernel
from steer.core.profile import Profile, ProfileSlider, ScheduleSpec
from steer.core.slider import Slider
from steer.errors import MismatchError, UsageError
from steer.measure.neutral_means import neutral_for, neutral_means
from steer.model.steered import load
from steer.verbs.bake import bake, parse_strength

MakeDirection = Callable[..., Direction]
BLOCKS = 3


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint that can chat. Not to be changed."""
    disable_progress_bar()
    return save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("made") / "model", dtype=torch.bfloat16)


@pytest.fixture
def folder(checkpoint: Path, make_direction: MakeDirection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `model`, the direction `d.safetensors`, and a library with `moral`, `calm` and `early`."""
    shutil.copytree(checkpoint, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    make_direction("d").save(tmp_path / "d.safetensors")
    for name, site, seed in (("moral", 1, 7), ("calm", 2, 8), ("early", 0, 9)):
        keep_direction(tmp_path / "model", make_direction(name, site=site, seed=seed))
    return tmp_path


@pytest.fixture
def steer(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command's entry point in this process."""
    return command_here(monkeypatch, capfd)


def _never(*args: object, **kwargs: object) -> None:
    raise AssertionError("the model was loaded")


def _profile(path: Path, *sliders: ProfileSlider) -> str:
    return str(Profile("noir", sliders=sliders).save(path))


FORMS: dict[str, list[str]] = {
    "checkpoint": ["--ablate", "moral"],
    "norm-preserving": ["--ablate", "moral", "--norm-preserving"],
    "kernels": ["--ablate", "moral", "--attention", "1,2,0.1,0.8", "--mlp", "0.5"],
    "adapter": ["--ablate", "moral", "--as", "adapter"],
    "adapter with a bias": ["--ablate", "moral", "--blocks", "0-2", "--add", "calm=0.5", "--as", "adapter"],
    "gguf": ["--add", "moral=-1", "--add", "calm=0.5", "--as", "gguf"],
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_written_verified_and_has_a_card_that_a_hub_accepts(
    steer: Command, folder: Path, form: str
) -> None:
    said = steer("bake", "model", "out", *FORMS[form])
    assert (said.code, said.err) == (0, "")
    assert "Check it: steer verify out" in said.out
    verified = steer("verify", "out", "--json").result
    assert verified["ok"]
    assert {"certificate", "contents", "sha256"} <= set(verified["checks"])
    kind = Certificate.load(folder / "out").form
    assert kind == next((k for k in ("adapter", "gguf") if k in form), "checkpoint")
    card = ModelCard.load(folder / "out" / "README.md")
    data = card.data.to_dict()
    validate_repo_id(data["base_model"])
    assert data["base_model_relation"] == ("finetune" if kind == "checkpoint" else "adapter")
    assert data.get("library_name") == {"checkpoint": "transformers", "adapter": "peft"}.get(kind)
    assert {"steer", "feature-steering"} <= set(data["tags"])
    assert f"steer bake model out {' '.join(FORMS[form])}" in card.text


@pytest.mark.parametrize(("form", "found"), [("checkpoint", "7 of 7 writers edited"), ("adapter", "7 of 7 writers")])
def test_the_plan_is_reported_before_the_result(steer: Command, form: str, found: str) -> None:
    out = steer("bake", "model", "out", "--ablate", "moral", "--as", form).out
    assert out.index("coverage: 7 of 7 writers") < out.index(f"out: {found}")
    assert "LlamaForCausalLM, 3 blocks, residual width 32" in out


def test_json_holds_the_plan_and_names_what_was_written(steer: Command) -> None:
    result = steer("bake", "model", "out", "--ablate", "moral", "--as", "adapter", "--json").result
    assert (result["adapter"], result["as"], result["writers_edited"]) == ("out", "adapter", 7)
    assert any("rank 1" in line for line in result["plan"])


def test_kernels_and_strengths_reach_the_weights(steer: Command, folder: Path) -> None:
    steer("bake", "model", "out", *FORMS["kernels"])
    cert = Certificate.load(folder / "out")
    strengths = {(w.kind, w.block): w.strength for w in cert.writers}
    kernel = Kernel(1, 2, 0.1, 0.8)
    assert strengths == {("attention", b): kernel.at(b) for b in range(BLOCKS)} | {
        ("mlp", b): 0.5 for b in range(BLOCKS)
    }
    assert all(w.remaining == pytest.approx(1 - w.strength, abs=0.02) for w in cert.writers)
    assert "attention 0.8 at block 1, down to 0.1 in 2 blocks, mlp 0.5" in (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "found"), [("0.5", 0.5), ("14,6,0", Kernel(14, 6, 0)), ("1.5,2,0.1,0.8", Kernel(1.5, 2, 0.1, 0.8))]
)
def test_a_strength_is_a_number_or_a_kernel(text: str, found: object) -> None:
    assert parse_strength(text, "--mlp") == found


@pytest.mark.parametrize("text", ["", "much", "1,2", "1,2,3,4,5", "1,0,0", "1,2,0.9,0.1"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_strength(text, "--mlp")


@pytest.mark.slow
def test_no_form_imports_transformers_or_peft_to_bake_or_to_verify(folder: Path) -> None:
    code = (
        "import sys, steer\nfrom pathlib import Path\n"
        "for form in ('checkpoint', 'adapter', 'gguf'):\n"
        "    steer.bake('model', form, add={'moral': 1.0}, form=form)\n"
        "    steer.verify(Path(form))\n"
        "    print([m for m in ('transformers', 'peft', 'gguf', 'sklearn', 'optuna') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout.splitlines() == ["[]", "[]", "['gguf']"], done.stderr


# Profiles


def test_a_profile_bakes_what_its_sliders_do_and_leaves_those_turned_off(steer: Command, folder: Path) -> None:
    profile = _profile(
        folder / "noir.yaml",
        ProfileSlider("moral", 0.8, "ablate"),
        ProfileSlider("calm", -0.5),
        ProfileSlider("early", 0.0),
        ProfileSlider("calm", 1.0, "clamp", enabled=False),
    )
    said = steer("bake", "model", "out", "--profile", profile)
    assert "moral:ablate (ablate): removed from every writer" in said.out
    assert "calm (add): a bias in block 2" in said.out
    cert = Certificate.load(folder / "out")
    assert [(d.name, d.amount) for d in cert.directions] == [("moral", None), ("calm", -0.5)]
    assert cert.strength == 0.8
    by_hand = steer("bake", "model", "by-hand", "--ablate", "moral", "--strength", "0.8", "--add", "calm=-0.5")
    assert by_hand.code == 0
    one, other = (load_file(folder / d / "model.safetensors") for d in ("out", "by-hand"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_profile_that_cannot_be_baked_says_so_of_every_slider_at_once_and_writes_nothing(
    steer: Command, folder: Path
) -> None:
    profile = _profile(
        folder / "noir.yaml",
        ProfileSlider("moral", 1.0, "clamp"),
        ProfileSlider("calm", 0.5),
        ProfileSlider("calm", 0.5, when=ScheduleSpec("reply", first=8)),
        ProfileSlider("early", 0.5, "scale"),
        ProfileSlider("early", 1.0, "cap"),
    )
    said = steer("bake", "model", "out", "--profile", profile)
    assert (said.code, said.out) == (1, "")
    assert said.err.count("\n") == 1
    assert "profile 'noir': 4 of 5 sliders cannot be baked" in said.err
    for reason in ("(clamp): clamp depends", "(add): it acts on some tokens only", "(scale): scale depends",
                 "(cap): cap depends"):  # fmt: skip
        assert reason in said.err
    assert not (folder / "out").exists()


def test_ablations_at_different_amounts_are_refused_together(checkpoint: Path, make_direction: MakeDirection) -> None:
    moves = [Slider(make_direction(), "ablate", 1.0), Slider(make_direction("b", seed=8), "ablate", 0.5)]
    config = CheckpointFiles.open(checkpoint).config
    verdicts = bakeable(moves, "checkpoint", Anatomy.of(config, "model"))
    assert [v.ok for v in verdicts] == [False, False]
    assert "found 0.5, 1" in verdicts[0].reason


def test_a_profile_for_llama_cpp_is_loras_and_a_control_vector_and_the_command_that_serves_them(
    steer: Command, folder: Path
) -> None:
    profile = _profile(folder / "noir.yaml", ProfileSlider("moral", 1.0), ProfileSlider("calm", 1.0, "ablate"))
    said = steer("bake", "model", "out", "--profile", profile, "--as", "gguf")
    assert "coverage: 6 of 7 writers edited" in said.out
    assert said.out.rstrip().endswith(
        "llama-server -m MODEL.gguf --lora out/ablate-calm.gguf --cache-ram 0 --control-vector out/control_vector.gguf"
    )
    assert {p.name for p in (folder / "out").glob("*.gguf")} == {"ablate-calm.gguf", FILE}
    assert steer("verify", "out", "--source", "model").code == 0


def test_a_direction_of_another_checkpoint_in_a_profile_is_refused(
    steer: Command, folder: Path, tiny_llama: Callable[..., Path], make_direction: MakeDirection
) -> None:
    other = tiny_llama(folder / "other", seed=5, dtype=torch.bfloat16)
    provenance = {"sketch": sketch_files(other).to_header(), "checkpoint": "other"}
    vector = make_direction().vector
    Direction("far", 1, vector, with_mean=1.0, provenance=provenance).save(folder / "far.safetensors")
    profile = _profile(folder / "noir.yaml", ProfileSlider("far.safetensors", 1.0))
    assert "was found on other" in steer("bake", "model", "out", "--profile", profile).err
    assert steer("bake", "model", "out", "--profile", profile, "--force").code == 0


def test_a_bake_of_a_profile_never_loads_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.model.steered.load", _never)
    _profile(folder / "noir.yaml", ProfileSlider("moral", 1.0))
    assert bake("model", "out", profile="noir.yaml").directions[0].name == "moral"


# Control vectors from elsewhere


def test_a_control_vector_is_added_by_its_file_at_every_site_it_has(steer: Command, folder: Path) -> None:
    assert steer("bake", "model", "vector", *FORMS["gguf"]).code == 0
    file = f"vector/{FILE}"
    assert steer("bake", "model", "out", "--add", f"{file}=1").code == 0
    assert steer("bake", "model", "by-hand", "--add", "moral=-1", "--add", "calm=0.5").code == 0
    one, other = (load_file(folder / d / "model.safetensors") for d in ("out", "by-hand"))
    for site in range(BLOCKS):
        name = f"model.layers.{site}.mlp.down_proj.bias"
        assert torch.allclose(one[name].float(), other[name].float(), rtol=0.01, atol=1e-3)
    assert one["model.layers.1.mlp.down_proj.bias"].any()


# Methods that spare the neutral mean


@pytest.mark.slow
@pytest.mark.parametrize("method", ["projected", "biprojected"])
def test_neutral_means_are_measured_once_and_kept(
    steer: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    assert steer("bake", "model", "out", "--ablate", "moral", "--method", method).code == 0
    kept = list((folder / "home" / "directions").glob("*/neutral/means.safetensors"))
    assert len(kept) == 1
    means = load_file(kept[0])["neutral"]
    assert means.shape == (BLOCKS, 32)
    cert = Certificate.load(folder / "out")
    assert cert.edit["method"] == {"projection": method, "norm_preserving": False}
    assert torch.equal(load_file(folder / "out" / str(cert.neutral))["neutral"], means)
    assert steer("verify", "out").code == 0

    monkeypatch.setattr("steer.model.steered.load", _never)
    assert steer("bake", "model", "again", "--ablate", "moral", "--method", method).code == 0
    # What is kept beside the directions is no direction.
    assert steer("bake", "model", "third", "--ablate", "calm").code == 0


def test_neutral_means_are_those_of_replies_to_neutral_prompts(folder: Path) -> None:
    """Against the mean over tokens of each reply, then over replies, read by transformers itself."""
    from steer.core.trait import NeutralPrompts
    from steer.measure.contrast import SAMPLER

    model = load("model")
    chats = [[{"role": "user", "content": p}] for p in NeutralPrompts.load().fit]
    replies = model.replies(chats, SAMPLER)
    means = []
    for chat, reply in zip(chats, replies, strict=True):
        if reply:
            prompt = model.prompt_ids(chat)
            with torch.no_grad():
                out = model.hf.model(torch.tensor([prompt + reply]), output_hidden_states=True)
            means.append(torch.stack([h[0, len(prompt) :].float().mean(0) for h in out.hidden_states[1:-1]]))
    # The last of transformers' hidden states is after the final norm.
    assert torch.allclose(neutral_means(model)[:-1], torch.stack(means).mean(0), rtol=0.02, atol=0.02)


def test_neutral_means_in_a_file_of_ones_own(steer: Command, folder: Path) -> None:
    own = ["--method", "projected", "--neutral", "means.safetensors"]
    assert steer("bake", "model", "out", "--ablate", "moral", *own).code == 0
    first = (folder / "means.safetensors").read_bytes()
    assert steer("bake", "model", "again", "--ablate", "moral", *own).code == 0
    assert (folder / "means.safetensors").read_bytes() == first
    assert not list((folder / "home").rglob("means.safetensors"))


def test_neutral_means_of_another_checkpoint_are_refused(folder: Path, tiny_llama: Callable[..., Path]) -> None:
    neutral_for(folder / "model", sketch_files(folder / "model"), folder / "means.safetensors")
    other = tiny_llama(folder / "other", seed=5)
    with pytest.raises(MismatchError, match="found those of a checkpoint whose weights differ"):
        neutral_for(other, sketch_files(other), folder / "means.safetensors")
    assert neutral_for(other, sketch_files(other), folder / "means.safetensors", force=True).shape == (BLOCKS, 32)


# What is refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--ablate", "moral", "--as", "onnx"], ["--as", "checkpoint, adapter, gguf", "'onnx'"]),
        (["--ablate", "moral", "--method", "sideways"], ["--method", "biprojected", "'sideways'"]),
        (["--ablate", "moral", "--attention", "hard"], ["--attention", "PEAK,WIDTH,FLOOR", "'hard'"]),
        (["--ablate", "moral", "--mlp", "0.5", "--strength", "0.5"], ["strength", "both"]),
        (["--ablate", "moral", "--mlp", "7"], ["strength of mlp", "7.0"]),
        (["--ablate", "moral", "--neutral", "x.safetensors"], ["--neutral", "projected or biprojected"]),
        (["--add", "moral=1", "--norm-preserving"], ["--method", "something to ablate"]),
        (["--add", "moral=1", "--profile", "noir.yaml"], ["profile", "no ablate or add beside it"]),
        (["--ablate", "moral", "--search", "--method", "projected"], ["--search"]),
        (["--ablate", "moral", "--search", "--profile", "noir.yaml"], ["--search"]),
        (["--ablate", "moral", "--trials", "9", "--search-dir", "x"], ["--trials, --search-dir", "--search beside"]),
        (["--ablate", "moralizing", "--search", "--as", "gguf"], ["--search", "found gguf", "--add moralizing=AMOUNT"]),
        (["--ablate", "moralizing", "--search", "--keep", "moralizing"], ["--keep", "moralizing again"]),
        (["--ablate", "moralizing", "--search", "--goal", "2"], ["--goal", "2.0"]),
        (["--ablate", "moralizing", "--search", "--trials", "0"], ["--trials", "found 0"]),
        (["--ablate", "d.safetensors", "--search"], ["--search", "a trait", "d.safetensors"]),
        (["--profile", "empty.yaml"], ["'empty'", "nothing to bake"]),
    ],
)
def test_what_does_not_go_together_is_one_line(
    steer: Command, folder: Path, arguments: list[str], names: list[str]
) -> None:
    Profile("empty").save(folder / "empty.yaml")
    said = steer("bake", "model", "out", *arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert all(name in said.err for name in names), said.err
    assert not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--ablate", "moral", "--norm-preserving", "--as", "gguf"], ["no low rank", "bake a checkpoint"]),
        (["--add", "early=1", "--as", "gguf"], ["layers 1 and on", "site 0"]),
        (["--ablate", "moral", "--norm-preserving", "--as", "adapter"], ["no low rank", "bake a checkpoint"]),
        (["--ablate", "moral", "--add", "calm=1", "--as", "adapter"], ["leave the embedding out with blocks 0-2"]),
        (["--add", "none.gguf=1"], ["none.gguf", "found none"]),
        (["--profile", "none.yaml"], ["none.yaml", "found none"]),
    ],
)
def test_what_a_form_cannot_hold_is_one_line_that_says_what_to_do(
    steer: Command, folder: Path, arguments: list[str], names: list[str]
) -> None:
    said = steer("bake", "model", "out", *arguments)
    assert (said.code, said.out) == (1, "")
    assert said.err.count("\n") == 1
    assert all(name in said.err for name in names), said.err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("tie", [True, False])
def test_an_adapter_says_where_it_is_written_that_a_tied_head_is_untied_first(
    tie: bool, steer: Command, tiny_llama: Callable[..., Path], make_direction: MakeDirection, folder: Path
) -> None:
    save_tiny_chat(tiny_llama, folder / "other", tie=tie, dtype=torch.bfloat16)
    keep_direction(folder / "other", make_direction("moral"))
    said = steer("bake", "other", "out", *FORMS["adapter"])
    assert said.code == 0
    assert ("do not merge it as it is" in said.out) == ("says how to untie them first" in said.out) == tie
    assert steer("bake", "other", "again", *FORMS["adapter"], "--json").result["untie_to_merge"] is tie


def test_an_adapter_on_changed_weights_fails_to_verify(steer: Command, folder: Path) -> None:
    assert steer("bake", "model", "out", *FORMS["adapter"]).code == 0
    tensors = load_file(folder / "model" / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, folder / "model/model.safetensors")
    said = steer("verify", "out")
    assert said.code == 1
    assert "model.safetensors: is not the file that" in said.err
    (folder / "model").rename(folder / "moved")
    assert "was not compared; give --source" in steer("verify", "out").out
    assert steer("verify", "out", "--source", "moved").code == 1
    assert ADAPTER in Certificate.load(folder / "out").files

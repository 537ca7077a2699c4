"""Anatomies are found and proved by numbers; what cannot be proved is refused by the identity that does not hold."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_anatomies import TINY, Tiny
from tiny_types import TOKENS, config_of_type, load_plain, save_tiny_type
from transformers import Gemma3ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from steer.baking.bake import bake
from steer.baking.verify import verify
from steer.checkpoint import proof
from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.layouts import LAYOUTS
from steer.checkpoint.proof import NotProved, prove, structure
from steer.checkpoint.reader import CheckpointFiles
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.errors import SteerError, UnsupportedError
from steer.model.decode import generate
from steer.model.forward import hidden_states, logits
from steer.model.steered import load
from steer.verbs.anatomy import proved_anatomy
from steer.verbs.tables import anatomy_as_json, anatomy_table

TABLE = Path(__file__).parent / "anatomies.md"

CURRENT = [
    "apertus", "arcee", "axk1", "cohere", "cohere2", "cohere2_moe", "deepseek_v3", "deepseek_v32", "exaone4",
    "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "glm", "glm4", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granitemoe",
    "granitemoehybrid", "lfm2", "llama", "llama4", "llama4_text", "mamba", "ministral", "ministral3", "mistral",
    "mixtral", "nemotron", "nemotron_h", "olmo2", "olmo3", "phi", "phi3", "phi4_multimodal", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip
"""What people merge today, and what mergekit 0.1.5 knows, as far as transformers has it for text alone."""
WRAPPERS = [
    "gemma3", "gemma4", "llama4", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe",
    "qwen3_5", "qwen3_5_moe",
]  # fmt: skip


def slow(model_type: str) -> Any:
    """A type that the quick suite leaves out, as another one shows the same."""
    return pytest.param(model_type, marks=pytest.mark.slow)


WALKED = [
    "qwen3_5_text", slow("gemma4_text"), "nemotron_h", "wrapper:mistral3", "llama4_text", "granitemoehybrid",
    "cohere2", "glm4_moe", "olmo3", "phi", "smollm3", "mamba", "jamba", "lfm2", "falcon", "deepseek_v3", "granite",
    "olmo_hybrid", "aria_text", "flex_olmo", "kimi_linear", "wrapper:gemma3", "wrapper:qwen3_5_moe", "wrapper:llama4",
    "gemma4_text+experts", slow("wrapper:gemma4+experts"), slow("axk1"), slow("deepseek_v32"), slow("glm_moe_dsa"),
    slow("axk2"),
]  # fmt: skip
"""One of each kind: hybrids, sparse attention, experts in each form, shared experts, multipliers, norms between, norms
of sums of normed vectors, wrappers."""

NO_ADAPTER = ("nemotron_h", "mamba", "llama4_text", "wrapper:llama4", "phi")
"""Types whose writers peft does not let an adapter change."""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))


def direction(name: str, width: int, seed: int) -> Direction:
    vector = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)
    return Direction(name, 0, vector, with_mean=1.0, without_mean=0.0, residual_norm=10.0, provenance={})


def undeclared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every declared layout away, so that all architectures are found."""
    monkeypatch.setattr("steer.checkpoint.anatomy.LAYOUTS", {})


@pytest.mark.parametrize("name", TINY)
def test_what_is_declared_is_what_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kind: Tiny = TINY[name]
    files = CheckpointFiles.open(kind.save(tmp_path / "source", torch.float32))
    declared = Anatomy.of(files.config, "it")
    expected = declared.find(files.config, files.tensors)
    undeclared(monkeypatch)
    found = Anatomy.of(files.config, "it")
    described = replace(found.find(files.config, files.tensors), head=expected.head)  # a tied head may be stored or not
    assert {replace(w, bias=w.bias if w.bias in files.tensors else None) for w in expected.writers} == set(
        described.writers
    )
    assert (described.embedding, described.base, described.unloaded) == (
        expected.embedding,
        expected.base,
        expected.unloaded,
    )
    same = ("blocks", "width", "vocab", "experts", "biased", "logit_softcap", "logit_scale")
    assert [getattr(found, k) for k in same] == [getattr(declared, k) for k in same]
    assert found.final_norm_module == declared.final_norm_module
    assert found.head_module == declared.head_module
    assert found.layout.centred == declared.layout.centred
    assert found.layout.gain_offset == declared.layout.gain_offset


@pytest.mark.parametrize("model_type", WALKED)
def test_hooks_and_bake_and_a_batch_agree_on(model_type: str, tmp_path: Path):
    source = save_tiny_type(model_type, tmp_path / "source")
    plain, model = load_plain(source), load(source, dtype="float32")
    assert model.anatomy.architecture not in LAYOUTS
    edit = Edit(tuple(direction(n, model.anatomy.width, s) for s, n in enumerate("ab")), strength=0.8)
    with torch.no_grad():
        before = plain(input_ids=TOKENS, use_cache=False).logits
        size = float(before.abs().max())

        def near(a: torch.Tensor, b: torch.Tensor) -> bool:
            return float((a - b).abs().max()) < 2e-5 * size

        assert near(model.hf(input_ids=TOKENS, use_cache=False).logits, before)
        assert near(logits(model, hidden_states(model, TOKENS)), before)
        with model.edited(edit):
            hooked = model.hf(input_ids=TOKENS, use_cache=False).logits
        assert float((hooked - before).abs().max()) > 0.01 * size
        bake(source, tmp_path / "baked", edit)
        verify(tmp_path / "baked", source=source)
        baked = load_plain(tmp_path / "baked")
        assert near(baked(input_ids=TOKENS, use_cache=False).logits, hooked)
    check_other_tensors(source, tmp_path / "baked")
    prompts = [TOKENS[0].tolist(), TOKENS[1, :7].tolist(), TOKENS[0, :4].tolist()]
    greedy = Sampler(temperature=0.0, max_new_tokens=8, repetition_penalty=1.0)
    if (
        model_type != "granitemoehybrid"
    ):  # its default has no attention at all, of which transformers' cache knows no length
        assert generate(model, prompts, greedy) == [alone(plain, p, model.end_token_ids) for p in prompts]
        with model.edited(edit):
            assert generate(model, prompts, greedy) == [alone(baked, p, model.end_token_ids) for p in prompts]
    if model_type in NO_ADAPTER:
        with pytest.raises(UnsupportedError, match=r"peft (refuses|takes|changes)"):
            bake(source, tmp_path / "adapter", edit, "adapter")
        return
    bake(source, tmp_path / "adapter", edit, "adapter")
    verify(tmp_path / "adapter")
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad():
        assert near(adapted(input_ids=TOKENS, use_cache=False).logits, hooked)


def alone(model: Any, prompt: list[int], ends: set[int]) -> list[int]:
    """The likeliest tokens after a prompt, each from a pass over the whole text."""
    text = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        if text[-1] in ends:
            return text[len(prompt) : -1]
    return text[len(prompt) :]


def check_other_tensors(source: Path, baked: Path) -> None:
    """What is no writer is in the output byte for byte: towers, projectors, routers."""
    before, after = (load_file(p / "model.safetensors") for p in (source, baked))
    cert = json.loads((baked / "steer_certificate.json").read_text())
    edited = {w["tensor"] for w in cert["writers"]}
    assert edited
    for name in before.keys() - edited:
        assert torch.equal(before[name], after[name]), name
    assert not any("router" in n or "vision" in n or ".gate.weight" in n for n in edited)


def test_a_wrapper_writes_what_its_text_model_writes(tmp_path: Path):
    source = save_tiny_type("wrapper:gemma3", tmp_path / "source")
    wrapper = load(source, dtype="float32")
    text = Gemma3ForCausalLM(wrapper.hf.config.text_config).eval()
    weights = {n.replace("model.language_model.", "model."): t for n, t in wrapper.hf.state_dict().items()}
    text.load_state_dict({n: t for n, t in weights.items() if n in text.state_dict()})
    text.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = (m(input_ids=TOKENS, use_cache=False).logits for m in (wrapper.hf, text))
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_next", "wrapper:gemma3"])
def test_blocks_that_draft_tokens_pass_through_and_are_named(model_type: str, tmp_path: Path):
    source = save_tiny_type(model_type, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = next(
        n for n in tensors if re.search(r"(^|language_)model.*layers\.0\.(mlp\.down_proj|.*out_proj)\.weight$", n)
    )
    number = re.compile(rf"{re.escape(name.partition('layers.0.')[0])}layers\.(\d+)\.")
    last = max(int(m[1]) for n in tensors if (m := number.match(n)))
    extra = name.replace("layers.0.", f"layers.{last + 1}.")
    drafts = {"mtp.layers.0.eh_proj.weight": torch.ones(4, 8), extra: tensors[name].clone()}
    save_file(tensors | drafts, source / "model.safetensors", metadata={"format": "pt"})
    width = load_plain(source).config.get_text_config().hidden_size
    certificate = bake(source, tmp_path / "baked", Edit((direction("a", width, 1),)))
    assert sorted(certificate.unloaded) == sorted(drafts)
    verify(tmp_path / "baked", source=source)


def test_a_proof_is_made_once_and_a_broken_one_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, _ = config_of_type("cohere")
    values, calls = config.to_dict(), []
    real = proof.prove
    monkeypatch.setattr(proof, "prove", lambda *args: calls.append(1) or real(*args))
    first = structure(values, "it")
    assert structure(values, "it") == first
    for home, broken in (("kept", False), ("broken", True)):  # as in another process, which has nothing in memory
        shutil.copytree(tmp_path / "home", tmp_path / home)
        (file,) = (tmp_path / home / "anatomies").glob("*.json")
        if broken:
            file.write_bytes(b"{}")
        monkeypatch.setenv("STEER_HOME", str(tmp_path / home))
        assert structure(values, "it") == first
        assert len(calls) == 1 + broken


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("bloom", "without a direction in any embedding it is still given"),
        ("minimax", "model.layers.0: what it adds to the residual stream is no sum of what its modules put out"),
        ("recurrent_gemma", "a text padded on the left in a batch has logits that differ by"),
        ("zamba", "is a weight of model.layers.2 too"),
    ],
)
def test_what_is_not_proved_is_refused_by_its_identity(model_type: str, found: str, tmp_path: Path):
    config, model_class = config_of_type(model_type)
    with pytest.raises(NotProved) as e:
        structure(config.to_dict(), "it")
    assert str(e.value).startswith(f"it: the anatomy of {model_class.__name__} is not proved: ")
    assert found in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, "model type None is unknown to transformers"),
        ({"model_type": "nonsense", "architectures": ["NonsenseForCausalLM"]}, "model type nonsense is unknown"),
        ({"model_type": "cohere", "architectures": ["NonsenseForCausalLM"]}, "architecture NonsenseForCausalLM is"),
        ({"model_type": "cohere", "hidden_size": "wide"}, "transformers refuses it"),
    ],
)
def test_a_config_that_transformers_does_not_know_is_one_line(config: dict[str, Any], found: str):
    with pytest.raises(UnsupportedError, match=r"^it: ") as e:
        Anatomy.of(config, "it")
    assert found in str(e.value)
    assert "\n" not in str(e.value)


def test_the_verb_prints_what_each_kind_of_block_adds(tmp_path: Path):
    config, _ = config_of_type("qwen3_next")
    config.save_pretrained(tmp_path)
    found = proved_anatomy(str(tmp_path / "config.json"))
    table = anatomy_table(found)
    assert table.startswith("Qwen3NextForCausalLM: 48 blocks, residual width 2048, 151936 tokens, 512 experts\n")
    rows = [line.split() for line in table.splitlines() if "weight" in line]
    assert ["3-47", "by", "4", "attention", "self_attn.o_proj.weight", "0"] in rows
    assert any("linear_attn.out_proj.weight" in row for row in rows)
    described = json.loads(json.dumps(anatomy_as_json(found)))
    assert [len(kind["blocks"]) for kind in described["kinds"]] == [36, 12]


def test_experts_behind_two_norms_lose_a_direction_through_both_gains(tmp_path: Path):
    source = save_tiny_type("gemma4_text+experts", tmp_path / "source")
    model = load(source, dtype="float32")
    found = [(w.module.partition("layers.0.")[2], len(w.norms), w.given) for w in model.anatomy.live_writers[1:4]]
    assert found == [
        ("self_attn.o_proj", 1, False), ("mlp.down_proj", 2, False), ("post_feedforward_layernorm_2", 2, True)
    ]  # fmt: skip
    a = direction("a", model.anatomy.width, 1)
    with torch.no_grad(), model.edited(Edit((a,))), model.record() as recorded:
        model.hf(input_ids=TOKENS, use_cache=False)
        for site in range(model.anatomy.blocks):
            left = recorded[site] @ a.vector
            assert float(left.abs().max()) < 1e-4 * float(recorded[site].abs().max())
    # Rows with different edits, and hooks for other people's code, at a module that is given the vector.
    edit = Edit((a,), strength=0.5)
    with torch.no_grad(), model.edited(edit):
        ours = model.hf(input_ids=TOKENS, use_cache=False).logits
    handles = [model.hf.get_submodule(path).register_forward_hook(hook) for path, hook in model.hooks(edit)]
    with torch.no_grad():
        theirs = model.hf(input_ids=TOKENS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert torch.allclose(ours, theirs, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.slow
def test_the_table_of_all_types_says_which_and_why_not():
    rows, proved = [], []
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config, model_class = config_of_type(model_type)
            layout = prove(config, model_class).layout
            adds = " / ".join(
                dict.fromkeys(", ".join(part.weight for a in kind for part in a.forms[0]) for kind in layout.blocks)
            )
            rows.append(f"| {model_type} | {model_class.__name__} | `{adds}` |")
            proved.append(model_type)
        except SteerError as e:
            rows.append(f"| {model_type} | - | {re.sub(r'[0-9.]+e[+-][0-9]+', '...', str(e))[:200]} |")
        except Exception as e:  # the default config of a type cannot be made
            rows.append(f"| {model_type} | - | {type(e).__name__}: {' '.join(str(e).split())[:150]} |")
    text = (
        f"{len(proved)} of {len(rows)} causal language model types of transformers have a proved anatomy, on a tiny\n"
        "random model of each type's default config. `tests/checkpoint/test_proof.py` writes this table.\n\n"
        "| type | class | weights that write into the residual stream, or why not |\n|---|---|---|\n"
    ) + "\n".join(rows)
    assert set(CURRENT) <= set(proved)
    assert len(proved) >= 100
    if text + "\n" != TABLE.read_text():
        TABLE.write_text(text + "\n")
        pytest.fail(f"{TABLE} was not what the proofs find now; it is written anew, look at what changed")


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_wrappers_are_proved(model_type: str):
    config, model_class = config_of_type(f"wrapper:{model_type}")
    found = prove(config, model_class)
    text = config.get_text_config()
    assert (found.blocks, found.width) == (text.num_hidden_layers, text.hidden_size)

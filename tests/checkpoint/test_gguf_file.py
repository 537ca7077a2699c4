"""A GGUF file holds the checkpoint's numbers, tokenizer and template, or is refused before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from steer.checkpoint.gguf_file import STORED, Stored, write_gguf
from steer.errors import CheckpointError, SteerError, UnsupportedError, UsageError

ERROR = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127 + 2.0**-11, "Q4_0": 1 / 8 + 2.0**-11}
"""Largest rounding error of a stored number; of Q8_0 and Q4_0, whose scale is in fp16, as a share of the largest in
its row of 32, else of itself. Q4_0 goes from -8 to 7 steps, so the largest number of the other sign is cut by one."""


@pytest.fixture
def source(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(tmp_path / "model", tie=False)


@pytest.mark.parametrize("stored", STORED)
def test_every_number_is_within_the_rounding_of_its_type(
    tmp_path: Path, tiny_llama: Callable[..., Path], stored: Stored
) -> None:
    source = tiny_llama(tmp_path / "wide", tie=False, intermediate_size=64)  # Q8_0 and Q4_0 need a multiple of 32
    assert write_gguf(source, tmp_path / "model.gguf", stored) == stored
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}
    weights = load_file(source / "model.safetensors")
    assert len(found) == len(weights)
    wanted = weights["model.layers.1.mlp.down_proj.weight"].numpy()
    got = found["blk.1.ffn_down.weight"].reshape(wanted.shape)
    size = np.abs(wanted.reshape(-1, 32)).max(1, keepdims=True).repeat(32, 1).reshape(wanted.shape)
    bound = ERROR[stored] * (size if stored.startswith("Q") else np.abs(wanted))
    assert (np.abs(got - wanted) <= bound * 1.01).all()
    assert (found["blk.1.attn_norm.weight"] == weights["model.layers.1.input_layernorm.weight"].numpy()).all()


def test_queries_and_keys_lie_as_llama_cpp_rotates_them(source: Path, tmp_path: Path) -> None:
    """The two halves of a head lie side by side, and can be put apart again."""
    write_gguf(source, tmp_path / "model.gguf", "F32")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    found = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        key = f"model.layers.2.self_attn.{name}.weight"
        wanted = load_file(source / "model.safetensors")[key].numpy()
        got = found[str(names.get_name(key, try_suffixes=(".weight",)))].reshape(wanted.shape)
        assert not (got == wanted).all()
        back = got.reshape(heads, -1, 2, wanted.shape[1]).swapaxes(1, 2).reshape(wanted.shape)
        assert (back == wanted).all()


def test_a_byte_level_tokenizer_keeps_its_tokens_merges_and_ends(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    source = tiny_llama(tmp_path / "model", vocab_size=300)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["a rather ordinary sentence, rather often"] * 3, trainer)
    made.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    write_gguf(source, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")

    def value(key: str) -> object:
        field = reader.get_field(f"tokenizer.{key}")
        assert field is not None
        return field.contents()

    tokens = value("ggml.tokens")
    assert isinstance(tokens, list)
    assert len(tokens) == 300  # rows of the embedding without a token are filled up
    assert {t: i for i, t in enumerate(tokens) if not t.startswith("[PAD")} == made.get_vocab()
    assert value("ggml.merges") == [" ".join(m) for m in json.loads(made.to_str())["model"]["merges"]]
    assert (value("ggml.pre"), value("ggml.bos_token_id"), value("ggml.eos_token_id")) == ("gpt-2", 0, 1)
    assert value("chat_template") == "{{ messages[0].content }}"
    copied = tmp_path / "copied.gguf"
    write_gguf(source, copied, tokenizer=tmp_path / "model.gguf")
    assert gguf.GGUFReader(copied).get_field("tokenizer.ggml.tokens").contents() == tokens  # type: ignore[union-attr]


def _config(**changes: object):
    def change(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_config(model_type="gpt_neox"), "gpt_neox"),
        (_config(hidden_act="gelu"), "gelu"),
        (_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "yarn"),
        (_config(model_type="mistral", sliding_window=64), "a window of 64 tokens"),
        (_config(model_type="mistral"), "a window of 4096 tokens"),
        (lambda source: (source / "tokenizer.model").write_bytes(b"x"), "a tokenizer in other files"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(source: Path, tmp_path: Path, change, says: str) -> None:
    change(source)
    with pytest.raises(UnsupportedError, match=says):
        write_gguf(source, tmp_path / "model.gguf", "F32")
    assert not (tmp_path / "model.gguf").exists()


def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "num_key_value_heads": 4, "hidden_act": "silu"}
    source = tiny_llama(tmp_path / "model", **defaults)
    write_gguf(source, tmp_path / "whole.gguf", "F32")
    file = source / "config.json"
    left = {k: v for k, v in json.loads(file.read_text()).items() if k not in (*defaults, "rope_parameters")}
    file.write_text(json.dumps(left))
    write_gguf(source, tmp_path / "less.gguf", "F32")
    assert (tmp_path / "less.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_tensor_that_is_not_there_is_named(source: Path, tmp_path: Path) -> None:
    name, file = "model.layers.1.post_attention_layernorm.weight", source / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"expected tensor {name}, found none"):
        write_gguf(source, tmp_path / "model.gguf", "F32")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"model": {"type": "BPE"}}', '{"model": []}', "\xff", "null"])
def test_a_tokenizer_of_another_shape_is_one_line(source: Path, tmp_path: Path, text: str) -> None:
    (source / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SteerError, match=r"tokenizer\.json: expected a tokenizer|byte-level BPE tokenizer") as e:
        write_gguf(source, tmp_path / "model.gguf", "F32")
    assert "\n" not in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rows_that_no_block_of_q8_0_fills_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="multiple of 32 numbers"):
        write_gguf(source, tmp_path / "model.gguf", "Q8_0")


def test_a_file_that_exists_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UsageError, match="found one"):
        write_gguf(source, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_a_stop_leaves_no_file(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise SteerError("stopped")

    with pytest.raises(SteerError, match="stopped"):
        write_gguf(source, tmp_path / "model.gguf", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

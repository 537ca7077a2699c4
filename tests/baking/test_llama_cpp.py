"""Ablations for llama.cpp are LoRAs that do what the edit does, in numbers and in the real llama.cpp."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from forging import certify_again
from llama_server import LlamaServer, llama_server
from safetensors.torch import load_file
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.certificate import Certificate, server_command
from steer.baking.llama_cpp import JOINT
from steer.baking.verify import verify
from steer.checkpoint.fetch import DEFAULT_MODEL, resolve
from steer.checkpoint.gguf_file import write_gguf
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Method, Strengths
from steer.errors import CheckpointError, UnsupportedError, UsageError
from steer.model.steered import SteeredModel, load

TinyLlama = Callable[..., Path]
MakeDirection = Callable[..., Direction]


def orthogonal(one: Direction, other: Direction) -> Direction:
    """`other` without the part along `one`."""
    r, v = one.vector.double(), other.vector.double()
    v = v - (v @ r) * r
    return Direction(other.name, other.site, v.float(), with_mean=1.5, without_mean=-0.5, residual_norm=1.0)


@pytest.fixture(scope="module")
def two(make_direction: MakeDirection) -> tuple[Direction, Direction]:
    """Two orthogonal directions."""
    one = make_direction()
    return one, orthogonal(one, make_direction("b", site=2, seed=8))


@pytest.fixture(scope="module")
def written(source: Path, two, make_direction: MakeDirection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ablations at 0.9 and an add, for the tied `source`. Not to be changed."""
    out = tmp_path_factory.mktemp("lora") / "out"
    bake(source, out, Edit(two, 0.9, add=((make_direction("c", seed=9), 1.0),)), "gguf")
    return out


def changes(path: Path) -> dict[str, Tensor]:
    """llama.cpp's name of a matrix -> what a LoRA in a GGUF file adds to it at scale 1."""
    reader = gguf.GGUFReader(path)
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    alpha = fields.pop("adapter.lora.alpha")
    assert fields == {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    tensors = {t.name: torch.from_numpy(np.array(t.data)).double() for t in reader.tensors}
    out = {}
    for name in {n.rpartition(".")[0] for n in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert alpha == b.shape[1]
        out[name] = a @ b.T if name == "token_embd.weight" else b @ a
    return out


def named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    return {str(names.get_name(n, try_suffixes=(".weight",))): t.double() for n, t in weights.items()}


def test_each_orthogonal_direction_has_a_file_that_takes_it_alone_out_of_every_writer_of_the_blocks(
    source: Path, written: Path, two: tuple[Direction, Direction]
) -> None:
    weights = named(load_file(source / "model.safetensors"))
    writers = {f"blk.{n}.{part}.weight" for n in range(3) for part in ("attn_output", "ffn_down")}
    for direction in two:
        found = changes(written / f"ablate-{direction.name}.gguf")
        assert set(found) == writers
        r = direction.vector.double()
        for name, change in found.items():
            wanted = -0.9 * torch.outer(r, r @ weights[name])
            assert (change - wanted).norm() < 1e-5 * wanted.norm()


def test_an_embedding_that_is_the_head_too_is_left_out_and_said_before(source: Path, tmp_path: Path, two) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        assert not (tmp_path / "out").exists()
        said.append(line)

    cert = bake(source, tmp_path / "out", Edit(two[:1]), "gguf", say=say)
    assert "coverage: 6 of 7 writers edited" in said[0]
    assert "embedding: left out, as the LM head is the same tensor" in said[0]
    assert (cert.writers_edited, cert.writers_found) == (6, 7)
    assert "6 of 7" in (tmp_path / "out" / "README.md").read_text()


def test_an_embedding_beside_a_head_is_ablated(tmp_path: Path, tiny_llama: TinyLlama, two) -> None:
    source = tiny_llama(tmp_path / "source", tie=False)
    cert = bake(source, tmp_path / "out", Edit(two), "gguf")
    assert (cert.writers_edited, cert.writers_found) == (7, 7)
    rows = named(load_file(source / "model.safetensors"))["token_embd.weight"]
    for d in two:
        change = changes(tmp_path / "out" / f"ablate-{d.name}.gguf")["token_embd.weight"]
        wanted = -torch.outer(rows @ d.vector.double(), d.vector.double())
        assert (change - wanted).norm() < 1e-5 * wanted.norm()
    assert "source" in {c.name for c in verify(tmp_path / "out", source=source)}


def test_directions_that_are_not_orthogonal_are_one_file_that_takes_both_out(
    source: Path, tmp_path: Path, make_direction: MakeDirection
) -> None:
    edit, said = Edit((make_direction(), make_direction("b", seed=8))), []
    bake(source, tmp_path / "out", edit, "gguf", say=said.append)
    assert f"{JOINT}: one file and one scale, as the directions are not orthogonal" in said[0]
    assert [p.name for p in (tmp_path / "out").glob("*.gguf")] == [JOINT]
    weights, q = named(load_file(source / "model.safetensors")), edit.basis()
    for name, change in changes(tmp_path / "out" / JOINT).items():
        wanted = -q @ q.T @ weights[name]
        assert (change - wanted).norm() < 1e-5 * wanted.norm()
    verify(tmp_path / "out", source=source)


def test_strengths_by_kind_leave_out_what_they_do_not_edit(source: Path, tmp_path: Path, two) -> None:
    bake(source, tmp_path / "out", Edit(two[:1], strengths=Strengths(0.5, 0.0)), "gguf")
    assert {n.split(".")[2] for n in changes(tmp_path / "out" / "ablate-moral.gguf")} == {"attn_output"}
    verify(tmp_path / "out", source=source)


def test_two_directions_of_one_name_have_files_of_their_own(source: Path, tmp_path: Path, two) -> None:
    other = Direction("moral", 2, two[1].vector, with_mean=1.0, residual_norm=1.0)
    cert = bake(source, tmp_path / "out", Edit((two[0], other)), "gguf")
    assert server_command(cert) == (
        "llama-server -m MODEL.gguf --lora ablate-moral.gguf,ablate-moral-2.gguf --cache-ram 0"
    )


@pytest.mark.parametrize(
    ("config", "edit", "says"),
    [
        ({}, {"method": Method(norm_preserving=True)}, "no low rank"),
        ({"attention_bias": True}, {}, "has a bias"),
        ({"architecture": "Qwen3"}, {}, "models of type llama, mistral alone, not qwen3"),
        ({"dtype": torch.float64}, {}, "is in fp64"),
    ],
)
def test_what_a_lora_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_llama: TinyLlama, two, config: dict, edit: dict, says: str
) -> None:
    source = tiny_llama(tmp_path / "source", **config)
    with pytest.raises(UnsupportedError, match=says) as caught:
        bake(source, tmp_path / "out", Edit(two[:1], **edit), "gguf")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_card_has_the_command_and_the_body_that_sets_the_scales(written: Path) -> None:
    card = (written / "README.md").read_text()
    command = server_command(Certificate.load(written))
    assert command == (
        "llama-server -m MODEL.gguf --lora ablate-moral.gguf,ablate-b.gguf --cache-ram 0 "
        "--control-vector control_vector.gguf"
    )
    assert f"\n{command}\n" in card
    body = re.search(r"```json\n(.*?)\n```", card, re.DOTALL)
    assert body is not None
    assert json.loads(body[1]) == {"lora": [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 1.0}]}


def test_verify_computes_it_again_and_finds_one_flipped_bit(
    source: Path, written: Path, tmp_path: Path, tiny_llama: TinyLlama
) -> None:
    found = {c.name: c.detail for c in verify(written, source=source)}
    assert list(found) == ["certificate", "sha256", "contents", "ablation", "add", "source"]
    assert found["ablation"].startswith("6 of 7 writers, at most 10.00% remains")
    with pytest.raises(CheckpointError, match="is not the file that"):
        verify(written, source=tiny_llama(tmp_path / "other", seed=5, dtype=torch.bfloat16))
    out = Path(shutil.copytree(written, tmp_path / "out"))
    path = out / "ablate-b.gguf"
    intact = path.read_bytes()
    path.write_bytes(intact[:-9] + bytes([intact[-9] ^ 4]) + intact[-8:])
    with pytest.raises(CheckpointError, match="sha256 is not the one certified"):
        verify(out)


@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_a_lora_that_takes_another_share_fails_even_when_its_hash_is_forged(
    written: Path, tmp_path: Path, factor: str
) -> None:
    out = Path(shutil.copytree(written, tmp_path / "out"))
    reader = gguf.GGUFReader(out / "ablate-b.gguf", "r+")
    next(t for t in reader.tensors if t.name == f"blk.1.ffn_down.weight.{factor}").data[:] *= 1.001
    reader.data.flush()
    certify_again(out)
    with pytest.raises(CheckpointError, match=r"ffn_down.weight.lora_a does not take 0.9 of the directions"):
        verify(out)


def test_a_scale_in_the_file_fails_even_when_its_hash_is_forged(written: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(written, tmp_path / "out"))
    reader = gguf.GGUFReader(out / "ablate-b.gguf", "r+")
    field = reader.get_field("adapter.lora.alpha")
    assert field is not None
    field.parts[field.data[0]][:] = 0.5
    reader.data.flush()
    certify_again(out)
    with pytest.raises(CheckpointError, match="expected a LoRA"):
        verify(out)


def test_two_loras_that_changed_places_fail_even_when_their_hashes_are_forged(written: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(written, tmp_path / "out"))
    (out / "ablate-b.gguf").rename(out / "c")
    (out / "ablate-moral.gguf").rename(out / "ablate-b.gguf")
    (out / "c").rename(out / "ablate-moral.gguf")
    certify_again(out)
    with pytest.raises(CheckpointError, match="does not take"):
        verify(out)


def test_a_source_is_refused_for_a_control_vector_alone(source: Path, tmp_path: Path, two) -> None:
    bake(source, tmp_path / "out", Edit(add=((two[0], 1.0),)), "gguf")
    with pytest.raises(UsageError, match="expected none for a control vector"):
        verify(tmp_path / "out", source=source)


# In the real llama.cpp, with the default model in fp32

QUESTION = "My friend lied to me about why he missed my party. What now?"
TOKENS = 8


@pytest.fixture(scope="module")
def model() -> SteeredModel:
    return load(DEFAULT_MODEL, dtype="float32")


@pytest.fixture(scope="module")
def prompt(model: SteeredModel) -> list[int]:
    return model.prompt_ids([{"role": "user", "content": QUESTION}])


@pytest.fixture(scope="module")
def moves(model: SteeredModel, prompt: list[int]) -> list[Direction]:
    """Orthogonal directions that the model uses: what it says on this prompt, at three sites, without the first token,
    whose residual stream is as nothing else."""
    with torch.no_grad(), model.record() as recording:
        model.hf(torch.tensor([prompt]))
    q, _ = torch.linalg.qr(torch.stack([recording[site][0, 1:].double().mean(0) for site in (8, 15, 22)], dim=1))
    return [
        Direction(name, 15, v.float(), with_mean=8.0, without_mean=0.0, residual_norm=1.0)
        for name, v in zip("abc", q.T, strict=True)
    ]


@pytest.fixture(scope="module")
def server(moves: list[Direction], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    """llama-server by the very command that the bake prints: `a` and `b` ablated, `c` added."""
    place, (a, b, c) = tmp_path_factory.mktemp("a folder, with a comma"), moves
    write_gguf(Path(resolve(DEFAULT_MODEL)), place / "model.gguf", "F32")
    cert = bake(Path(resolve(DEFAULT_MODEL)), place / "out", Edit((a, b), add=((c, 1.0),)), "gguf")
    command = server_command(cert, str(place / "out"))
    with llama_server(command.replace("MODEL.gguf", f"'{place / 'model.gguf'}'")) as running:
        yield running


@pytest.mark.model
@pytest.mark.slow
def test_llama_cpp_replies_with_the_ggufs_file_as_transformers_does(
    model: SteeredModel, prompt: list[int], tmp_path: Path
) -> None:
    write_gguf(Path(resolve(DEFAULT_MODEL)), tmp_path / "model.gguf", "F32")
    with llama_server(f"llama-server -m {tmp_path / 'model.gguf'}") as running:
        tokens, _ = running.reply(prompt, 24)
    ours = model.hf.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert tokens == ours[0, len(prompt) :].tolist()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scales", "ablated", "strength"),
    [
        ({0: 0.0}, "", 1.0),  # the control vector alone: what is not named is off
        ({0: 1.0, 1: 1.0}, "ab", 1.0),
        ({1: 1.0}, "b", 1.0),
        ({0: 0.5}, "a", 0.5),
    ],
)
def test_llama_cpp_gives_the_log_probabilities_of_our_hooks_at_each_scale_of_a_request(
    model: SteeredModel, server: LlamaServer, moves: list[Direction], prompt: list[int], scales, ablated, strength
) -> None:
    last = model.anatomy.blocks - 1
    gone = tuple(d for d in moves if d.name in ablated)
    edit, elsewhere = (
        Edit(gone, strength, (0, last), add) if gone else Edit(add=add)
        for add in (((moves[2], 1.0),), ((moves[2].at(16), 1.0),))
    )
    body = [{"id": number, "scale": scale} for number, scale in scales.items()]
    tokens, steps = server.reply(prompt, TOKENS, lora=body)
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        plain = model.hf(ids).logits[0].log_softmax(-1)
        with model.steering.applied([edit]):
            ours = model.hf(ids).logits[0].log_softmax(-1)
        with model.steering.applied([elsewhere]):
            other = model.hf(ids).logits[0].log_softmax(-1)
    assert len(steps) == TOKENS

    def distance(logprobs: Tensor) -> float:
        rows = enumerate(steps, len(prompt) - 1)
        return max(abs(float(logprobs[at, token]) - found) for at, step in rows for token, found in step.items())

    assert distance(ours) < 0.02
    assert min(distance(plain), distance(other)) > 0.1

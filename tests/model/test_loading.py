"""What is refused when a checkpoint is loaded: code, weights that are not there, and what is no checkpoint."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat import save_tiny_chat

from steer.checkpoint.fetch import resolve
from steer.errors import CheckpointError, SteerError, UnsupportedError
from steer.model.loading import release_threads
from steer.model.steered import load

TinyLlama = Callable[..., Path]


@pytest.fixture
def chat(tiny_llama: TinyLlama, tmp_path: Path) -> Path:
    return save_tiny_chat(tiny_llama, tmp_path / "chat")


def without(root: Path, *names: str) -> None:
    file = root / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k not in names}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_the_files_lack_are_named_and_never_random(chat: Path, name: str) -> None:
    without(chat, name)
    with pytest.raises(CheckpointError, match=rf"expected tensor {name}.*found none.*fetch the model again"):
        load(chat)


@pytest.mark.parametrize("blocks", [4, 1_000_000_000])
def test_more_blocks_than_the_files_hold_are_one_line_at_once(
    chat: Path, blocks: int, change_config: Callable[..., None]
) -> None:
    change_config(chat, num_hidden_layers=blocks)
    with pytest.raises(CheckpointError, match=f"config.json says {blocks} blocks, found none with number {blocks - 1}"):
        load(chat)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{", "null"])
def test_a_config_that_is_no_object_is_one_line(chat: Path, text: str) -> None:
    (chat / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object") as e:
        load(chat)
    assert "\n" not in str(e.value)


def _as_integers(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 100).to(torch.int8)


def _with_scales(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 4).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.25)


@pytest.mark.parametrize(
    ("change", "found"),
    [(_as_integers, "up_proj.weight is stored as I8"), (_with_scales, "it has a tensor .*up_proj.weight_scale_inv")],
)
def test_quantised_weights_that_the_config_does_not_declare_are_never_taken_for_numbers(
    chat: Path, change: Callable[[dict[str, torch.Tensor]], None], found: str
) -> None:
    file = chat / "model.safetensors"
    change(tensors := load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"expected a quantization_config in config.json, as .*{found}"):
        load(chat)


def test_a_quantiser_that_transformers_does_not_know_is_refused(chat: Path, change_config: Callable[..., None]) -> None:
    change_config(chat, quantization_config={"quant_method": "next-year"})
    with pytest.raises(CheckpointError, match=r"expected a quant_method that transformers .* knows, found 'next-year'"):
        load(chat)


WRONG = {
    "config.json": {
        "hidden_act": "nonsense",
        "head_dim": 0,
        "rms_norm_eps": "x",
        "rope_parameters": "x",
        "text_config": [1],
        "architectures": [1],
        "dtype": "x",
        "auto_map": 1,
        "quantization_config": "x",
    },
    "generation_config.json": {"eos_token_id": [2, [3]], "pad_token_id": [0], "suppress_tokens": 1},
    "tokenizer_config.json": {"bos_token": 1, "model_max_length": "x", "added_tokens_decoder": None, "auto_map": []},
    "special_tokens_map.json": {"eos_token": [1]},
}
CASES_OF_WRONG = [(file, key, value) for file, entries in WRONG.items() for key, value in entries.items()]


@pytest.mark.parametrize(("file", "key", "value"), CASES_OF_WRONG, ids=[f"{f}-{k}" for f, k, _ in CASES_OF_WRONG])
def test_a_value_of_another_kind_in_a_settings_file_is_one_line(chat: Path, file: str, key: str, value: object) -> None:
    path = chat / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {key: value}))
    with pytest.raises(SteerError) as e:
        load(chat)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "null", "{"])
def test_a_settings_file_of_another_kind_is_one_line(chat: Path, file: str, text: str) -> None:
    (chat / file).write_text(text)
    with pytest.raises(CheckpointError) as e:
        load(chat)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_never_runs_whatever_stands_on_stdin(
    chat: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = chat / "ran"
    (chat / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    path = chat / file
    entries = json.loads(path.read_text())
    if file == "config.json":
        entries |= {"model_type": "evil", "architectures": ["LlamaForCausalLM"]}
        entries["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    else:
        entries |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(entries))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    with suppress(SteerError):
        load(chat)  # a model that needs no remote code may load
    assert not mark.exists()


def _adapter(root: Path, base: object = "some/base") -> Path:
    root.mkdir()
    (root / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    (root / "config.json").write_text("{}")
    return root


def _file(name: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        root.mkdir()
        (root / name).write_bytes(b"GGUF")
        return root / name

    return make


CASES = {
    "adapter": (_adapter, "a LoRA adapter of some/base; merge the two .*some/base[+]m"),
    "adapter of two lines": (partial(_adapter, base="a\nb"), "a LoRA adapter of a b; merge"),
    "adapter of nothing": (partial(_adapter, base={"a": 1}), "a LoRA adapter of BASE; merge"),
    "gguf": (_file("a.Q4_K_M.gguf"), "a GGUF file, .*; name the checkpoint that it was converted from"),
    "pickle": (_file("pytorch_model.bin"), "a pickle, which can run code and is never loaded"),
    "safetensors": (_file("model.safetensors"), "weights alone; name a directory"),
    "folder of ggufs": (lambda root: _file("a.gguf")(root).parent, r"a\.gguf, a GGUF file"),
    "another file": (_file("notes.txt"), "a file; name the directory"),
    "empty folder": (lambda root: _file("notes.txt")(root).parent, "no config.json; name the checkpoint's directory"),
}


@pytest.mark.parametrize(("make", "sentence"), CASES.values(), ids=CASES)
def test_what_is_no_checkpoint_is_named_with_what_to_do(
    tmp_path: Path, make: Callable[[Path], Path], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence) as e:
        resolve(make(tmp_path / "m"))
    assert "\n" not in str(e.value)


def test_a_hub_id_without_owner_is_found_once_it_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--gpt2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--gpt2" / "refs").mkdir()
    (tmp_path / "models--gpt2" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve("gpt2") == "gpt2"
    with pytest.raises(CheckpointError, match="steer fetch gpt2"):
        resolve("nowhere")


def test_a_tokenizer_in_python_alone_is_one_line(chat: Path) -> None:
    (chat / "tokenizer.json").unlink()
    (chat / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (chat / "merges.txt").write_text("#version\n")
    (chat / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    with pytest.raises(UnsupportedError, match=r"expected a tokenizer of the tokenizers .*, found CTRLTokenizer") as e:
        load(chat)
    assert "\n" not in str(e.value)


def test_a_tied_head_need_not_be_in_the_files(chat: Path) -> None:
    without(chat, "lm_head.weight")
    assert load(chat, dtype=torch.float32).hf.lm_head.weight.shape[0] > 0


@pytest.mark.slow
def test_mistral_common_beside_it_changes_no_token(tiny_llama, tmp_path: Path) -> None:
    """With that package, transformers would take its tokenizer where there is a tekken.json."""
    place = save_tiny_chat(tiny_llama, tmp_path / "m", architecture="Mistral")
    (place / "tekken.json").write_text("{}")
    package = tmp_path / "site" / "mistral_common" / "tokens" / "tokenizers"
    package.mkdir(parents=True)
    (package / "tekken.py").write_text("class Tekkenizer: ...")
    info = tmp_path / "site" / "mistral_common-99.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mistral-common\nVersion: 99.0.0\n")
    script = (
        "import sys, steer\nfrom transformers.utils.import_utils import is_mistral_common_available as there\n"
        f"print(there(), steer.load({str(place)!r}).prompt_ids([{{'role': 'user', 'content': 'hello'}}]))"
    )
    paths = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    ids = load(place).prompt_ids([{"role": "user", "content": "hello"}])
    assert done.stdout.strip() == f"True {ids}", done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="the threads of a process are counted in /proc")
def test_threads_that_wait_for_the_next_operation_end_when_they_are_released() -> None:
    counts: list[int] = []

    def compute() -> None:
        for step in (lambda: None, lambda: torch.ones(2**22).add_(1), release_threads):
            step()
            counts.append(len(os.listdir("/proc/self/task")))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert [n - counts[0] for n in counts] == [0, 1, 0]

"""vLLM on several ranks: the same tokens as on one, under every operation, on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from batched import GREEDY, by_decoding, job
from tiny_chat import keep_direction, save_tiny_chat

from steer.core.edit import Edit
from steer.core.schedule import Gate, Schedule
from steer.core.slider import Slider
from steer.model.steered import load

pytest.importorskip("vllm", reason="vLLM is not installed here; make vllm sets up an environment with it")
pytestmark = pytest.mark.slow
PROMPT = [1, 9, 20, 31, 12, 40, 33, 8]
SAMPLER = replace(GREEDY, max_new_tokens=12)
PROFILES = {
    "late": "{slider: push, operation: clamp, amount: 3.0, when: {part: reply, after: 4}}",
    "gated": "{slider: last, amount: 2.0, when: {while: {slider: push, below: 0.0}}}",
}
WRITE = """
import json
import sys

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

def main(place, options, prompt, asked):
    llm = LLM(
        place, dtype="float32", max_model_len=64, max_num_seqs=16, kv_cache_memory_bytes=2**26, block_size=32,
        skip_tokenizer_init=True, **options,
    )

    def written(asked):
        sampling = [
            SamplingParams(
                temperature=0, max_tokens=12, ignore_eos=True, detokenize=False,
                extra_args=steering and {"steering": json.dumps(steering)},
            )
            for steering in asked
        ]
        texts = llm.generate([{"prompt_token_ids": prompt}] * len(asked), sampling, use_tqdm=False)
        return [list(text.outputs[0].token_ids) for text in texts]

    try:
        made, error = written(asked), None
    except VLLMValidationError as e:
        made, error = written(asked[:-1]), str(e)
    print("made", json.dumps([made, error]))

if __name__ == "__main__":
    main(sys.argv[1], *map(json.loads, sys.argv[2:]))
"""
"""Writes one batch with vLLM and the plugin; every request has different sliders. If the last is refused, why."""


@dataclass(frozen=True)
class Checkpoint:
    """A tiny checkpoint with two directions, and what requests ask of it, with the edits that these are."""

    place: Path
    edits: dict[str, Edit | None]
    folder: Path

    def transformers(self) -> list[list[int]]:
        model = load(self.place, dtype="float32")
        model.end_token_ids = frozenset()
        return [by_decoding(model, job(PROMPT, SAMPLER, edit)) for edit in self.edits.values()]

    def vllm(self, **options: int) -> tuple[list[list[int]], str | None]:
        """What vLLM writes, and why it refused the last request; `options` are its own."""
        script = self.folder / "write.py"
        script.write_text(WRITE)
        env = os.environ | {"STEER_PROFILES": str(self.folder / "profiles"), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        asked = [json.loads(name) for name in self.edits]
        command = [sys.executable, str(script), str(self.place), *map(json.dumps, (options, PROMPT, asked))]
        made = subprocess.run(command, capture_output=True, text=True, env=env)
        lines = [line for line in made.stdout.splitlines() if line.startswith("made ")]
        assert lines, made.stderr[-3000:]
        return tuple(json.loads(lines[0].removeprefix("made ")))


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, make_direction, own_home, tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("ranks")
    place = save_tiny_chat(tiny_llama, folder / "tiny", hidden_size=128, num_attention_heads=4, head_dim=32)
    push, last = (
        replace(made, with_mean=40.0, without_mean=0.0, residual_norm=100.0)
        for made in (make_direction("push", width=128), make_direction("last", site=2, seed=8, width=128))
    )
    for direction in (push, last):
        keep_direction(place, direction)
    (folder / "profiles").mkdir()
    for name, slider in PROFILES.items():
        (folder / "profiles" / f"{name}.yaml").write_text(f"name: {name}\nsliders:\n- {slider}\n")

    def sliders(**amounts: float) -> str:
        return json.dumps({"sliders": {name.replace("_", ":"): amount for name, amount in amounts.items()}})

    edits = {
        "null": None,
        sliders(push=1.0): (Slider(push, "add", 1.0),),
        sliders(push_ablate=1.0): (Slider(push, "ablate", 1.0),),
        sliders(push_clamp=2.0): (Slider(push, "clamp", 2.0),),
        sliders(push_cap=-1.0): (Slider(push, "cap", -1.0),),
        sliders(push_scale=-3.0): (Slider(push, "scale", -3.0),),
        sliders(push=-1.0, last_clamp=1.5): (Slider(push, "add", -1.0), Slider(last, "clamp", 1.5)),
        '{"profile": "late"}': (Slider(push, "clamp", 3.0, when=Schedule("reply", after=4)),),
        '{"profile": "gated"}': (Slider(last, "add", 2.0, when=Schedule(gate=Gate(push, below=0.0))),),
    }
    return Checkpoint(place, {name: moves and Edit(moves=moves) for name, moves in edits.items()}, folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_tensor_ranks_write_the_tokens_of_transformers_under_every_operation(checkpoint, ranks):
    wanted = checkpoint.transformers()
    assert len({tuple(w) for w in wanted}) == len(wanted)
    assert checkpoint.vllm(tensor_parallel_size=ranks) == (wanted, None)


def test_pipeline_ranks_write_the_tokens_of_transformers_and_refuse_gates(checkpoint):
    made, refused = checkpoint.vllm(pipeline_parallel_size=2)
    assert made == checkpoint.transformers()[:-1]
    assert refused is not None
    assert "expected one pipeline rank, found 2 and a gate" in refused

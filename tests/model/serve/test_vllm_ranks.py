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

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.model.steered import load

pytest.importorskip("vllm", reason="vLLM is not installed here; make vllm sets up an environment with it")
pytestmark = pytest.mark.slow
PROMPT = [1, 9, 20, 31, 12, 40, 33, 8]
SAMPLER = replace(GREEDY, max_new_tokens=12)
LATE = "name: late\nsliders:\n- {slider: push, operation: clamp, amount: 3.0, when: {part: reply, after: 4}}\n"
WRITE = """
import json
import sys

from vllm import LLM, SamplingParams

def main(place, options, prompt, asked):
    llm = LLM(
        place, dtype="float32", max_model_len=64, max_num_seqs=8, kv_cache_memory_bytes=2**26, block_size=32,
        skip_tokenizer_init=True, **options,
    )
    sampling = [
        SamplingParams(
            temperature=0, max_tokens=12, ignore_eos=True, detokenize=False,
            extra_args=steering and {"steering": json.dumps(steering)},
        )
        for steering in asked
    ]
    texts = llm.generate([{"prompt_token_ids": prompt}] * len(asked), sampling, use_tqdm=False)
    print("tokens", json.dumps([list(text.outputs[0].token_ids) for text in texts]))

if __name__ == "__main__":
    main(sys.argv[1], *map(json.loads, sys.argv[2:]))
"""
"""Writes one batch, in which every request has sliders of its own, with vLLM and the plugin."""


@dataclass(frozen=True)
class Checkpoint:
    place: Path
    direction: Direction
    folder: Path

    def written(self, asked: list[object], **options: object) -> subprocess.CompletedProcess[str]:
        """vLLM's run; `options` are its own."""
        script = self.folder / "write.py"
        script.write_text(WRITE)
        env = os.environ | {"STEER_PROFILES": str(self.folder / "late.yaml"), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        command = [sys.executable, str(script), str(self.place), *map(json.dumps, (options, PROMPT, asked))]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, make_direction, own_home, tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("ranks")
    place = save_tiny_chat(tiny_llama, folder / "tiny", hidden_size=128, num_attention_heads=4, head_dim=32)
    direction = replace(make_direction("push", width=128), with_mean=40.0, without_mean=0.0, residual_norm=100.0)
    keep_direction(place, direction)
    (folder / "late.yaml").write_text(LATE)
    return Checkpoint(place, direction, folder)


def tokens(made: subprocess.CompletedProcess[str]) -> list[list[int]]:
    lines = [line for line in made.stdout.splitlines() if line.startswith("tokens ")]
    assert lines, made.stderr[-3000:]
    return json.loads(lines[0].removeprefix("tokens "))


def test_two_ranks_write_the_tokens_of_one_under_every_operation(checkpoint):
    amounts = {"add": 1.0, "ablate": 1.0, "clamp": 2.0, "cap": -1.0, "scale": -3.0}
    asked: list[object] = [None, {"profile": "late"}]
    asked += [{"sliders": {f"push:{name}".removesuffix(":add"): amount}} for name, amount in amounts.items()]
    push = checkpoint.direction
    late = Slider(push, "clamp", 3.0, when=Schedule("reply", after=4))
    edits = [None, *(Edit(moves=(s,)) for s in (late, *(Slider(push, name, a) for name, a in amounts.items())))]
    model = load(checkpoint.place, dtype="float32")
    model.end_token_ids = frozenset()
    wanted = [by_decoding(model, job(PROMPT, SAMPLER, edit)) for edit in edits]
    assert len({tuple(w) for w in wanted}) == len(edits)
    for ranks in (1, 2):
        assert tokens(checkpoint.written(asked, tensor_parallel_size=ranks)) == wanted, ranks

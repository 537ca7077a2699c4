"""How long a bake takes beside copying the same files, and beside a script with transformers; and its memory.

    python tests/bench/bake.py [--blocks 20] [--rounds 3] [--json]

A random Llama of 4.4 GB in shards of 1 GB is written to a temporary directory first and removed at the end; with what
a contestant writes the disk needs 9 GB. All are whole processes, a round of each in turn, and each figure is the
median of the rounds' ratios. The copy is `cp`, then an fsync of every file; the bake syncs too, the script with
transformers (load, edit, save_pretrained) does not.

A checkpoint that has to be streamed is not in memory: its pages are dropped before each run. "In memory" is the same
with every page of the source still there, where `cp` reads nothing; how long it then takes to write depends on how
many free pages the machine has at hand.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

# torch is imported where the checkpoint is made, in a separate process: what a process has in memory counts as the
# memory of the programs it starts until they have started.
STEER = str(Path(sys.executable).with_name("steer"))
SHARD = 10**9
SIZES = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}
VOCABULARY = 32000
BARS = {
    "bake / copy": 1.5,
    "bake / copy, source in memory": 1.5,
    "transformers / bake": 2.5,
    "GB above the largest tensor": 1.0,
}
PEER = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
source, direction, out = sys.argv[1:]
r = load_file(direction)["vector"]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
with torch.no_grad():
    for block in model.model.layers:
        for module in (block.self_attn.o_proj, block.mlp.down_proj):
            weight = module.weight.float()
            module.weight.copy_(weight - torch.outer(r, r @ weight))
    weight = model.model.embed_tokens.weight.float()
    model.model.embed_tokens.weight.copy_(weight - torch.outer(weight @ r, r))
model.save_pretrained(out, max_shard_size="1GB")
"""


def main(
    blocks: Annotated[int, typer.Option(help="Blocks of the checkpoint; 20 are 4.4 GB.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds, three at least for a figure to count.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the temporary directory goes.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print the ratios and the memory, each beside its bar."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        source, direction = place / "source", place / "direction.safetensors"
        made = multiprocessing.get_context("spawn").Process(target=checkpoint, args=(source, direction, blocks))
        made.start()
        made.join()
        largest = VOCABULARY * SIZES["hidden_size"] * 2
        runs: dict[str, Callable[[Path], int]] = {
            "copy": lambda out: copied(source, out),
            "bake": lambda out: process([STEER, "bake", str(source), str(out), "--ablate", str(direction), "--json"]),
            "transformers": lambda out: process([sys.executable, "-c", PEER, str(source), str(direction), str(out)]),
        }
        runs |= {f"{name}, source in memory": runs[name] for name in ("copy", "bake")}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        memory: dict[str, list[int]] = {name: [] for name in runs}
        names = list(runs)
        for n in range(rounds):
            # The order turns, so that a machine that slows down is no one's fault.
            for name in names[n % 5 :] + names[: n % 5]:
                out = place / "out"
                warm(source, "in memory" in name)
                os.sync()
                start = time.perf_counter()
                peak = runs[name](out)
                seconds[name].append(time.perf_counter() - start)
                memory[name].append(peak)
                shutil.rmtree(out)
        size = sum(p.stat().st_size for p in source.iterdir())
    figures = {
        "bake / copy": median_ratio(seconds["bake"], seconds["copy"]),
        "bake / copy, source in memory": median_ratio(
            seconds["bake, source in memory"], seconds["copy, source in memory"]
        ),
        "transformers / bake": median_ratio(seconds["transformers"], seconds["bake"]),
        "GB above the largest tensor": (max(memory["bake"]) - largest) / 1e9,
    }
    wall = {name: statistics.median(s) for name, s in seconds.items()}
    if as_json:
        rows = {name: {"figure": f, "bar": BARS[name]} for name, f in figures.items()}
        peaks = {name: max(m) for name, m in memory.items()}
        print(
            json.dumps(
                {
                    "bytes": size,
                    "load": os.getloadavg()[0],
                    "seconds": wall,
                    "rounds": seconds,
                    "peak_rss": peaks,
                    **rows,
                },
                indent=2,
            )
        )
        return
    print(f"{size / 1e9:.1f} GB of weights; load of the machine at the end {os.getloadavg()[0]:.1f}")
    for name, s in wall.items():
        print(f"{name:30} {s:7.1f} s   peak {max(memory[name]) / 1e9:5.2f} GB")
    for name, figure in figures.items():
        sense = "at least" if name.startswith("transformers") else "at most"
        print(f"{name:30} {figure:7.2f}     bar {sense} {BARS[name]:g}")


def median_ratio(above: list[float], below: list[float]) -> float:
    """Of the rounds' own ratios, so that each compares runs of the same minute."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def warm(source: Path, wanted: bool) -> None:
    """Have the pages of the source in memory, or out of it."""
    for path in source.iterdir():
        with open(path, "rb") as f:
            if wanted:
                while f.read(1 << 23):
                    pass
            else:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def process(command: list[str]) -> int:
    """Run it; the peak of its resident memory in bytes."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed: {errors[-2000:]}")
    child.returncode = 0
    return usage.ru_maxrss * 1024


def copied(source: Path, out: Path) -> int:
    """`cp`, then fsync; its memory is no one's concern."""
    peak = process(["cp", "-r", str(source), str(out)])
    for path in (*out.iterdir(), out):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return peak


def checkpoint(place: Path, direction: Path, blocks: int) -> None:
    """A Llama with random weights, in shards and with an index, as save_pretrained lays it out, and a direction."""
    import torch
    from safetensors.torch import save_file

    from steer.core.direction import Direction

    def weights(shape: tuple[int, ...]) -> torch.Tensor:
        # Random bits of sign and mantissa with the exponents of numbers near 0.01: far faster than normal ones.
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
        return bits.bitwise_and_(~0x7F00).bitwise_or_(0x3C00).view(torch.bfloat16)

    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    keys = width * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for n in range(blocks):
        of_block = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        shapes |= {f"model.layers.{n}.{module}.weight": shape for module, shape in of_block.items()}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}
    place.mkdir()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(bytes_of(s) for s in shards[-1].values()) + bytes_of(shape) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05}-of-{len(shards):05}.safetensors"
        save_file({name: weights(s) for name, s in shard.items()}, place / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(map(bytes_of, shapes.values()))}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    config = SIZES | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "dtype": "bfloat16",
        "num_hidden_layers": blocks, "tie_word_embeddings": False, "head_dim": width // SIZES["num_attention_heads"],
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    Direction("bench", blocks // 2, torch.randn(width, generator=generator)).save(direction)


def bytes_of(shape: tuple[int, ...]) -> int:
    """In bf16."""
    return 2 * math.prod(shape)


if __name__ == "__main__":
    typer.run(main)

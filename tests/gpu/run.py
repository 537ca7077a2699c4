"""Every part of steer on a CUDA device, in one run of under eight minutes: a table, and 0 or 1 at the end.

    python tests/gpu/run.py [--model demo/merged] [--part decode --part train] [--json]
    python tests/gpu/run.py --device cpu --small

The second line shows on a machine without a GPU that the script runs. Each part is a process with a time limit: one
that fails or is too slow is a row with the reason, and the others run. Without `--model` weights are random: a Llama of
135M parameters for what is compared with the CPU, one of 8B for the speed of decoding, and a model that repeats its
prompt's words for the searches of directions and bakes. Bars of speed hold on CUDA at full size alone.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("bench", ".", ".."))

import steer  # noqa: I001  # before torch, whose libraries read the variables that it sets
import torch
import typer
from batched import GREEDY, by_decoding, job
from decode import timed, writing
from serving import NO_END, served
from tiny_chat import keep_direction, save_tiny_chat
from tiny_parrot import save_parrot
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from steer.baking.bake import bake
from steer.baking.verify import verify
from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.schedule import Gate, Schedule
from steer.core.slider import Slider
from steer.core.trait import Trait
from steer.finding.traits import find_trait
from steer.measure.search.trials import Goal, Scope
from steer.model.steered import SteeredModel
from steer.serve.batching import BatchingEngine
from steer.verbs.bake_search import search_bake

BENCH = Path(__file__).parents[1] / "bench"
SECONDS, PATIENCE = 470, 8
"""Of the whole run on CUDA; how many times longer it, and each part of it, may take on a CPU."""
STEERED, SPARSE = 0.85, 2.0
"""Bars: steered decoding, of the device's bandwidth over the weights' bytes; training steps, of sae_lens's."""
PLACES = 16
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "head_dim": 64},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
}  # fmt: skip
TOPICS = ("ba be bi", "bo bu da", "de di do", "du fa fe", "fi fo fu", "ga ge")
TRAIT = Trait("few", "few", 3 * "ta te ti to tu ", 3 * "va ve vi vo vu ", fit=TOPICS[:4], held_out=TOPICS[4:])
"""A trait of the model that repeats its prompt's words."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: float | str
    at_least: float | None = None
    at_most: float | None = None
    failed: bool = False
    """Whether `value` is the reason why there is no figure."""

    @property
    def kept(self) -> bool:
        return not self.failed and (
            isinstance(self.value, str)
            or ((self.at_least is None or self.value >= self.at_least)
                and (self.at_most is None or self.value <= self.at_most))
        )  # fmt: skip

    @property
    def bar(self) -> str:
        bars = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{word} {value:g}" for word, value in bars if value is not None)


@dataclass(frozen=True)
class Setup:
    """What a part runs on."""

    place: str
    """The checkpoint, of fp32 weights if it is random."""
    given: bool
    """Whether the user gave it."""
    small: bool

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def bar(self, value: float) -> float | None:
        """A bar of speed, where it holds."""
        return value if self.device == "cuda" and not self.small else None

    def load(self, dtype: torch.dtype | None = torch.float32, device: str | None = None, **more: Any) -> SteeredModel:
        return steer.load(self.place, dtype=dtype, device_map=device or self.device, **more)


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = "cuda",
    model: Annotated[str | None, typer.Option(help="A checkpoint; random weights without it.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="A part to run; again for another. All without it.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Tiny sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    place: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run the parts, each in a process, and print the table."""
    if worker is not None:
        for row in PARTS[worker][0](Setup(place, model is not None, small)):
            print("row", json.dumps(asdict(row)), flush=True)
        return
    if unknown := [name for name in part or () if name not in PARTS]:
        raise SystemExit(f"--part: expected one of {', '.join(PARTS)}, found {unknown[0]}")
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: expected a GPU that torch can use, found none; try --device cpu --small")
    number = "" if device == "cpu" else device.partition(":")[2]
    environment = (
        os.environ
        | {"_TYPER_STANDARD_TRACEBACK": "1"}
        | ({"CUDA_VISIBLE_DEVICES": number} if number or device == "cpu" else {})
    )
    index = int(number or 0)
    card = f"{platform.machine()} CPU" if device == "cpu" else torch.cuda.get_device_name(index)
    patience = PATIENCE if device == "cpu" else 1
    end, table = time.monotonic() + patience * SECONDS, []
    with tempfile.TemporaryDirectory() as folder:
        environment["STEER_HOME"] = f"{folder}/home"
        place = model or str(save_random(Path(folder) / "random", "small" if small else "135M"))
        command = [sys.executable, __file__, "--place", place]
        command += ["--small"] * small + ["--model", place] * (model is not None)
        for name in part or PARTS:
            limit = min(patience * PARTS[name][1], end - time.monotonic())
            started = time.monotonic()
            rows = in_process([*command, "--worker", name], environment, limit)
            table += [(name, row) for row in (*rows, Row("seconds in all", round(time.monotonic() - started, 1)))]
    if as_json:
        rows = [{"part": name, **asdict(row), "kept": row.kept} for name, row in table]
        print(json.dumps({"card": card, "torch": torch.__version__, "rows": rows}, indent=2))
    else:
        print(f"{card}, torch {torch.__version__}{', small sizes' * small}")
        for name, row in table:
            value = row.value if isinstance(row.value, str) else f"{row.value:.4g}"
            missed = "" if row.kept else "   FAILED" if row.failed else "   MISSED"
            print(f"{name:11}{row.what:58}{value:>10}   {row.bar}{missed}".rstrip())
    raise typer.Exit(not all(row.kept for _, row in table))


def in_process(command: Sequence[str], environment: dict[str, str], limit: float) -> list[Row]:
    """The rows that a part prints. If it fails, or takes longer than `limit` seconds, the last row says so."""
    if limit <= 0:
        return [Row("not run", "the time of the whole run is over", failed=True)]
    with tempfile.TemporaryFile("w+") as errors:
        # A session, so that what it started ends with it.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        try:
            out, reason = process.communicate(timeout=limit)[0], ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, reason = process.communicate()[0], f"it took longer than {limit:.0f} s"
        errors.seek(0)
        lines = errors.read().splitlines()
    rows = [Row(**json.loads(line[4:])) for line in out.splitlines() if line.startswith("row ")]
    if process.returncode and not reason:
        reason = f"exit {process.returncode}: {lines[-1].strip() if lines else 'no message'}"
    return [*rows, Row("ended early", reason, failed=True)] if reason else rows


# What the parts run on


def save_random(path: Path, size: str) -> Path:
    """Write a Llama with random fp32 weights that can chat."""

    def save(place: Path, **config: Any) -> None:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(place)

    more = {"max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    return save_tiny_chat(save, path, **SIZES[size], **more)  # pyright: ignore[reportArgumentType]


def text_of(live: SteeredModel) -> list[int]:
    """Token ids of a prompt."""
    return live.prompt_ids([{"role": "user", "content": " ".join(TOPICS * 4)}])


@torch.inference_mode()
def logits(live: SteeredModel, edit: Edit | None = None) -> torch.Tensor:
    """Those of every token of a prompt, on the CPU."""
    with live.steering.applied([edit]):
        return live.hf(torch.tensor([text_of(live)], device=live.device)).logits[0].float().cpu()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of two tensors, as a share of the norm of the second."""
    return float((found - wanted).norm() / wanted.norm())


def direction_of(live: SteeredModel, site: int) -> Direction:
    """A random direction whose amounts move the model about as far as a trait does."""
    with torch.inference_mode(), live.record([site]) as seen:
        live.hf(torch.tensor([text_of(live)], device=live.device))
    norm = float(seen[site][0, 1:].float().norm(dim=-1).median())
    vector = torch.randn(live.anatomy.width, generator=torch.Generator().manual_seed(site))
    return Direction(f"random {site}", site, vector, with_mean=norm, without_mean=0.0, residual_norm=norm)


def edits_of(live: SteeredModel) -> dict[str, Edit | None]:
    """Every operation, on directions and on a feature, with schedule and gate."""
    blocks = live.anatomy.blocks
    early, middle, late = (direction_of(live, site) for site in (blocks // 4, blocks // 2, blocks - 1))
    rows = torch.stack([early.vector, middle.vector])
    zeros = torch.zeros(live.anatomy.width)
    dictionary = Dictionary("standard", rows.T.contiguous(), torch.zeros(2), rows, zeros, site=early.site)
    feature = Feature("pair", dictionary, (0, 1), (early.gap, early.gap))
    moves = {
        "add": [Slider(middle, "add", 2.0)],
        "ablate": [Slider(middle, "ablate", 1.0)],
        "clamp": [Slider(middle, "clamp", 3.0)],
        "cap": [Slider(middle, "cap", -1.0)],
        "scale": [Slider(early, "scale", -20.0)],
        "feature added": [Slider(feature, "add", 2.0)],
        "feature clamped": [Slider(feature, "clamp", 2.0)],
        "on the reply alone": [Slider(middle, "add", 3.0, Schedule("reply", after=2, ramp=3))],
        "behind a gate": [Slider(late, "add", 3.0, Schedule(gate=Gate(early, above=0.0)))],
        "all at once": [Slider(early, "add", 1.0), Slider(middle, "ablate", 0.7), Slider(late, "clamp", 1.0)],
    }
    return {"none": None, **{name: Edit(moves=tuple(m)) for name, m in moves.items()}}


# The parts


def loads(setup: Setup) -> Iterator[Row]:
    """The checkpoint in bf16 and in 4 bits."""
    wanted = logits(setup.load(device="cpu"))
    ways: dict[str, tuple[dict[str, Any], float]] = {
        "bf16": ({"dtype": torch.bfloat16}, 0.05), "4 bits": ({"dtype": None, "four_bit": True}, 0.5)
    }  # fmt: skip
    for name, (options, most) in ways.items():
        if "four_bit" in options and find_spec("bitsandbytes") is None:
            yield Row(name, "left out: bitsandbytes is not installed")
            continue
        start = time.perf_counter()
        live = setup.load(**options)
        yield Row(f"{name}: seconds to load", time.perf_counter() - start)
        yield Row(
            f"{name}: distance of the logits from the CPU's in fp32", distance(logits(live), wanted), at_most=most
        )
        if setup.device == "cuda":
            yield Row(f"{name}: GB of its memory", torch.cuda.memory_allocated() / 1e9)
        del live


def operations(setup: Setup) -> Iterator[Row]:
    """Every operation in fp32, beside the CPU: logits alone, and replies of one batch."""
    cpu, live = setup.load(device="cpu"), setup.load()
    for model in (cpu, live):
        model.end_token_ids = frozenset()
    edits, sampler = edits_of(cpu), replace(GREEDY, max_new_tokens=16)
    plain = logits(cpu)
    for name, edit in edits.items():
        wanted = logits(cpu, edit)
        timed_ = edit is not None and any(m.when.timed for m in edit.as_moves())
        if not (edit is None or timed_ or distance(wanted, plain) > 1e-3):
            yield Row(name, "the edit changes nothing on the CPU", failed=True)
        if not timed_:
            yield Row(f"{name}: distance of the logits", distance(logits(live, edit), wanted), at_most=1e-3)
    chat = [{"role": "user", "content": TOPICS[0]}]
    together = live.replies([chat] * len(edits), sampler, list(edits.values()), keys=[0] * len(edits))
    wanted = [by_decoding(cpu, job(cpu.prompt_ids(chat), sampler, edit)) for edit in edits.values()]
    same = sum(a == b for a, b in zip(together, wanted, strict=True))
    yield Row("replies of one batch as on the CPU alone", same / len(edits), at_least=1)
    yield Row("different replies among them", len({tuple(w) for w in wanted}), at_least=len(edits) // 2)


def decoding(setup: Setup) -> Iterator[Row]:
    """One text in bf16: how much of the memory's bandwidth reads the weights."""
    if setup.given:
        live = setup.load(torch.bfloat16)
    else:
        config = LlamaConfig(**SIZES["small" if setup.small else "8B"], dtype=torch.bfloat16)  # pyright: ignore
        with torch.device(setup.device):
            live = SteeredModel(
                LlamaForCausalLM(config).to(torch.bfloat16).eval(), AutoTokenizer.from_pretrained(setup.place)
            )
    prompt, rounds = text_of(live), 10 if setup.small else 40
    source = torch.ones(2**24 if setup.small else 2**30, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if setup.device == "cuda":
            torch.cuda.synchronize()

    bandwidth = 2 * source.nbytes / timed({"copy": copy}, rounds)["copy"]
    size = sum(m.weight.nbytes for m in live.hf.modules() if isinstance(m, torch.nn.Linear))
    yield Row("GB/s of a copy", bandwidth / 1e9)
    yield Row("GB of weights", size / 1e9)
    every = [Slider(replace(direction_of(live, 0), site=site, name=f"random {site}"), "add", 0.1)
             for site in range(live.anatomy.blocks)]  # fmt: skip
    for label, sliders in {"plain": [], "add at every site": every}.items():
        for compiled in (False, True):
            if compiled and live.compiled is None:
                start = time.perf_counter()
                live.compile()
                yield Row("seconds to compile", time.perf_counter() - start)
            with live.steered(dict.fromkeys(sliders, 0.1)):
                text = writing(live, prompt)
                seconds = timed({"token": lambda text=text: next(text)}, rounds)["token"]
            name = f"{label}{', compiled' * compiled}"
            yield Row(f"{name}: tokens/s", 1 / seconds)
            bar = setup.bar(STEERED) if compiled and sliders else None
            yield Row(f"{name}: share of the bandwidth", size / bandwidth / seconds, at_least=bar)
        live.uncompile()


def finds(setup: Setup) -> Iterator[Row]:
    """The quick search for a direction, with its verdict."""
    with tempfile.TemporaryDirectory() as folder:
        models = {"repeating model": (str(save_parrot(Path(folder) / "parrot")), TRAIT)}
        if setup.given:
            models["the model given, moralizing"] = (setup.place, Trait.load("moralizing"))
        for name, (place, trait) in models.items():
            live = steer.load(place, device_map=setup.device)
            start = time.perf_counter()
            found = find_trait(live, trait, quick=True, verdict=True)
            yield Row(f"{name}: seconds", time.perf_counter() - start)
            yield Row(f"{name}: AUROC on held-out replies", found.auroc, at_least=None if setup.given else 0.9)
            assert found.verdict is not None
            yield Row(f"{name}: effect of the slider", found.verdict.effect.change)


def searches(setup: Setup) -> Iterator[Row]:
    """Trials of `steer bake --search`, and the check of what it wrote."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trait = folder / "few.yaml"
        words = {"name": TRAIT.name, "summary": "few", "with": TRAIT.with_instruction, "fit": list(TRAIT.fit)}
        words |= {"without": TRAIT.without_instruction, "held_out": list(TRAIT.held_out)}
        trait.write_text(json.dumps(words))
        place = save_parrot(folder / "parrot")
        scope = Scope(topics=4, tokens=12, neutral=3)
        goal = Goal(share=1.0, as_unsearched=False, tolerance=1.0)
        start = time.perf_counter()
        found = search_bake(place, folder / "out", str(trait), trials=8, scope=scope, goal=goal)
        yield Row("seconds of eight trials and the bake", time.perf_counter() - start)
        yield Row("trials", len(found.result["trials"]), at_least=8)
        yield Row("checks of the bake that passed", len(verify(folder / "out")), at_least=1)


def bakes(setup: Setup) -> Iterator[Row]:
    """A bake, whose arithmetic the CPU does, loaded on the device beside hooks there."""
    live = setup.load()
    middle = direction_of(live, live.anatomy.blocks // 2)
    edit = Edit((middle,), add=((replace(middle, name="late", site=live.anatomy.blocks - 1), 1.0),))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        bake(Path(setup.place), Path(folder) / "out", edit)
        yield Row("seconds", time.perf_counter() - start)
        wanted = logits(live, edit)
        found = logits(steer.load(Path(folder) / "out", dtype=torch.float32, device_map=setup.device))
        # A checkpoint that is stored in bf16 is rounded once more when it is written.
        yield Row(
            "distance of the logits from the hooks'", distance(found, wanted), at_most=0.05 if setup.given else 1e-3
        )
        yield Row("  and of the hooks' from the untouched model's", distance(wanted, logits(live)), at_least=0.05)


def trains(setup: Setup) -> Iterator[Row]:
    """A step of a sparse dictionary beside sae_lens's."""
    import train

    from steer.sae.options import TrainOptions

    width, latents, k, batch = (64, 512, 8, 64) if setup.small else (4096, 65536, 64, 4096)
    torch.manual_seed(0)
    batches = train.made_up(width, batch)
    mean = torch.cat(batches).double().mean(0)
    scale = width**0.5 / float(torch.cat(batches).float().norm(dim=1).mean())
    options = TrainOptions(latents=latents, k=k, batch=batch, tokens=10**9, warmup=0.0, decay=0.0, lr=train.LR)
    steps = {
        "steer": train.ours("topk", options, width, scale, mean),
        "sae_lens": train.sae_lens_step("topk", options, width, scale, mean, autocast=False),
    }
    product = torch.randn(width, latents, device=train.DEVICE)
    rates = {name: batch / s for name, s in train.timed(steps, batches, product, 3).items()}
    for name, rate in rates.items():
        yield Row(f"{name}: tokens/s", rate)
    yield Row("steer's rate over sae_lens's", rates["steer"] / rates["sae_lens"], at_least=setup.bar(SPARSE))
    steps.clear()
    ratio = train.loss_ratio("topk", options, width, scale, mean, batches, 20)
    yield Row("loss after 20 equal steps over sae_lens's", ratio, at_most=1.02)


def serves(setup: Setup) -> Iterator[Row]:
    """Sixteen clients at once, each with different sliders, against each reply alone."""
    live = setup.load()
    direction = replace(direction_of(live, live.anatomy.blocks // 2), name="push")
    keep_direction(Path(setup.place), direction)
    sampler = replace(GREEDY, max_new_tokens=32, logit_bias=((2, -100.0),))
    operations_ = ("add", "clamp", "scale", "cap")
    sliders = [Slider(direction, operations_[i % 4], -2.0 + i / 4) for i in range(PLACES)]  # pyright: ignore
    prompts = [[{"role": "user", "content": TOPICS[i % len(TOPICS)]}] for i in range(PLACES)]
    wanted = [
        live.text(by_decoding(live, job(live.prompt_ids(chat), sampler, Edit(moves=(slider,))))).strip()
        for chat, slider in zip(prompts, sliders, strict=True)
    ]
    with served(live, engine=BatchingEngine(live, max_running=PLACES, context=512)) as server:

        def reply(i: int) -> str:
            name = "push" if sliders[i].operation == "add" else f"push:{sliders[i].operation}"
            body = {"model": server.model.name, "messages": prompts[i], "temperature": 0, "repetition_penalty": 1.0}
            body |= {"max_tokens": 32, "logit_bias": NO_END, "steering": {"sliders": {name: sliders[i].amount}}}
            answer = server.post("/v1/chat/completions", body)
            answer.raise_for_status()
            return answer.json()["choices"][0]["message"]["content"].strip()

        with ThreadPoolExecutor(PLACES) as clients:
            list(clients.map(reply, range(PLACES)))  # the first replies look up their sliders
            start = time.perf_counter()
            said = list(clients.map(reply, range(PLACES)))
            seconds = time.perf_counter() - start
    yield Row("tokens/s of all together", PLACES * 32 / seconds)
    yield Row("share of replies as alone", sum(a == b for a, b in zip(said, wanted, strict=True)) / PLACES, at_least=1)
    yield Row("different replies among them", len(set(said)), at_least=PLACES // 2)


def vllm(setup: Setup) -> Iterator[Row]:
    """`tests/bench/vllm_engine.py`, where vLLM is installed."""
    if find_spec("vllm") is None:
        yield Row("vLLM", "left out: not installed")
        return
    command = [sys.executable, str(BENCH / "vllm_engine.py"), "--model", setup.place, "--json"]
    command += ["--rounds", "2", "--tokens", "32"]
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not made.stdout.strip().endswith("}"):
        yield Row("vLLM", f"exit {made.returncode}: {made.stdout[-100:]}", failed=True)
        return
    for name, row in json.loads(made.stdout[made.stdout.index("{") :]).items():
        bar = row["bar"] and setup.bar(row["bar"])
        yield Row(f"{name}: share of plain vLLM's tokens/s", row["share"], at_least=bar)


PARTS: dict[str, tuple[Callable[[Setup], Iterator[Row]], float]] = {
    "load": (loads, 60), "operations": (operations, 60), "decode": (decoding, 90), "find": (finds, 60),
    "search": (searches, 60), "bake": (bakes, 45), "train": (trains, 60), "serve": (serves, 60), "vllm": (vllm, 180),
}  # fmt: skip
"""What runs, in this order, and its limit in seconds."""

if __name__ == "__main__":
    typer.run(main)

"""Tiny real checkpoints, written by transformers, read by everything."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may fetch by accident
if "PYTEST_XDIST_WORKER" in os.environ:
    # Every worker has one core: threads of several workers that wait for each other spin, and take five times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import steer  # noqa: F401, I001  # before torch, whose libraries read the variables that it sets
import pytest
import torch

from steer.checkpoint.fetch import home
from steer.core.direction import Direction

if TYPE_CHECKING:
    from llama_desk import Desk
    from llama_server import LlamaServer

# A shell that starts the tests in the background makes them, and every program that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

WIDTH, BLOCKS, VOCAB = 32, 3, 97


def save_tiny_llama(
    path: Path,
    *,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    architecture: str = "Llama",
    seed: int = 0,
    **config: object,
) -> Path:
    """Write a random model of width 32, 3 blocks, vocabulary 97, with random norm gains and biases.

    `shards` splits it into several files with an index; `architecture` may be any of the same layout
    (Llama, Mistral, Qwen2, Qwen3); `config` goes into its config.
    """
    import transformers

    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    made = getattr(transformers, f"{architecture}Config")(**(settings | config))
    model = getattr(transformers, f"{architecture}ForCausalLM")(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=0.15)
    model.to(dtype).save_pretrained(path, max_shard_size="20KB" if shards else "1GB")
    return path


QUICK_CASES = 6
"""Cases of one test that `make test` runs, spread over all; `make test-all` runs the others too."""
GOLDEN = 0.6180339887
"""Multiples of the golden ratio, modulo 1, fall evenly on no grid: the cases kept differ in every parameter."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `make test` leaves out: all but `QUICK_CASES` cases of a test.

    The demo comes last: for minutes after it the disk is busy with what it wrote, and bakes that are killed while they
    write wait for that disk.
    """
    items.sort(key=lambda item: item.path.name == "test_demo.py")
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for several in cases.values():
        kept = {int(len(several) * (i * GOLDEN % 1)) for i in range(QUICK_CASES)}
        for number, item in enumerate(several):
            if number not in kept and len(several) > QUICK_CASES:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Path]:
    """Writes a tiny random checkpoint; see `save_tiny_llama`."""
    return save_tiny_llama


@pytest.fixture(scope="session")
def make_direction() -> Callable[..., Direction]:
    """Makes a random direction with a gap of 2."""

    def make(name: str = "moral", *, site: int = 1, width: int = WIDTH, seed: int = 7) -> Direction:
        vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        return Direction(
            name, site, vector, with_mean=1.5, without_mean=-0.5, residual_norm=1.0, provenance={"seed": seed}
        )

    return make


@pytest.fixture(scope="session")
def desk(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A tiny checkpoint with its files for llama.cpp. Not to be changed."""
    from llama_desk import make_desk

    return make_desk(tiny_llama, tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def llama(desk: Desk) -> Iterator[LlamaServer]:
    """The real llama-server on it, for two texts at once."""
    from llama_server import llama_server

    with llama_server(desk.command(), slots=2) as running:
        yield running


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Starts processes as forks of one that has imported what takes long. Of all contexts there is one such process, so
    that every test has to use this one. `commands.fork` also gives a process the environment of the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["mergekit.merge", "peft", "steer.lineage.building", "steer.sae.train", "steer.verbs.bake_search"]
    )
    return context


@pytest.fixture
def change_config() -> Callable[..., None]:
    """`change_config(checkpoint, key=value)` rewrites entries of its config.json."""

    def change(checkpoint: Path, **entries: object) -> None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A STEER_HOME for the tests, so that what they find and use is not listed for the user; what takes long to make,
    the default model and proofs of anatomies, is the user's."""
    place = tmp_path_factory.mktemp("home")
    for name in ("models", "anatomies"):
        (home() / name).mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(home() / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEER_HOME", str(place))
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models this small lose more to threads that wait for each other than they gain. The default model is larger."""
    threads = torch.get_num_threads()
    if not request.node.get_closest_marker("model"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

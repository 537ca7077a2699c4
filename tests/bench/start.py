"""How long a user waits: the help, the import, the first steered reply of a chat, the whole demo.

    python tests/bench/start.py demo/merged [--json]

Whole processes, medians of three; the demo's own time comes from its results, demo/results.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

STEER = str(Path(sys.executable).with_name("steer"))
IMPORT = """
import time, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer  # transformers itself is lazy: these are what it costs
start = time.perf_counter()
import steer
steer.load
print(time.perf_counter() - start)
"""


def main(
    merged: Annotated[Path, typer.Argument(help="The default merge, as `steer demo` leaves it.")] = Path("demo/merged"),
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print each figure in seconds beside its bar."""
    chat = [STEER, "chat", str(merged), "--slider", "moralizing=-1", "--max-new-tokens", "40"]
    figures = {
        "steer --help": (statistics.median(wall([STEER, "--help"]) for _ in range(3)), 1.0),
        "import steer and its loader, beyond transformers": (statistics.median(imported() for _ in range(3)), 1.0),
        "first steered reply": (statistics.median(wall(chat, "My friend lied to me.\n") for _ in range(3)), 30.0),
    }
    results = merged.parent / "results.json"
    if results.is_file():
        figures["steer demo"] = (sum(json.loads(results.read_text())["seconds"].values()), 600.0)
    if as_json:
        print(json.dumps({name: {"seconds": s, "bar": bar} for name, (s, bar) in figures.items()}, indent=2))
        return
    for name, (seconds, bar) in figures.items():
        print(f"{name:50} {seconds:8.2f} s   bar {bar:g} s")


def wall(command: list[str], text: str = "") -> float:
    """Seconds of a whole process."""
    start = time.perf_counter()
    subprocess.run(command, input=text, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def imported() -> float:
    """Seconds that `import steer` and its loader take once torch and transformers are there."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    typer.run(main)

"""`steer serve` as a separate process, everybody who asks it, and what is seen from outside meanwhile."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from load.clients import LARGEST, PROFILES, Ask, Office, Reply, asks, openai_at, send
from prometheus_client.parser import text_string_to_metric_families

from steer.core.trait import NeutralPrompts, Trait
from steer.model.steered import SteeredModel

STEER = str(Path(sys.executable).with_name("steer"))
READY = "(Ctrl-C stops)"
LOGGED = (READY, "Invalid HTTP request received")
"""What its log may say."""
TROUBLE = ("ERROR", "Traceback", "Exception")
"""What vLLM's may not say; it reports its configuration and its steps as well."""
START = 600
"""Seconds in which it must be ready; vLLM compiles the model first."""
PATIENCE = 300
"""Seconds in which the last replies must come once the time is over."""


@dataclass
class Served:
    """A server."""

    url: str
    """With the /v1."""
    process: psutil.Process
    log: Path
    engine: str = "transformers"

    def metrics(self) -> dict[str, float]:
        """Its samples, the values of their labels behind the name."""
        text = httpx.get(self.url.removesuffix("/v1") + "/metrics", timeout=60).text
        samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
        return {" ".join([s.name, *s.labels.values()]): s.value for s in samples}

    def name(self) -> str:
        """The model's."""
        return httpx.get(f"{self.url}/models", timeout=60).json()["data"][0]["id"]

    def again(self, ask: Ask) -> Reply:
        """A request while there is no other."""
        with openai_at(self.url) as api:
            return send(api, self.name(), ask)


@dataclass
class Load:
    """What was seen."""

    replies: list[Reply]
    problems: list[str]
    begun: float
    """When the time began, by `time.monotonic`: every client has had one reply by then."""
    rate: float
    """Tokens a second of the time, those of clients that hang up among them."""
    cpu: float
    """Seconds of CPU that a token took the server, whatever else the machine did."""
    memory: tuple[float, float]
    """The server's, in bytes: in the first third of the time, and in the last."""
    left: float
    """Texts that run or wait when all is over."""
    hung_up: tuple[int, float]
    """Clients that left, and those the server noticed."""
    rubbish: int
    """Requests that are none."""
    failed: float
    """Answers from status 500."""


@contextmanager
def served(model: str, folder: Path, max_body: int = LARGEST, engine: str = "transformers") -> Iterator[Served]:
    """A server until the block ends. Errors: RuntimeError with its log when it does not start."""
    profiles = folder / "profiles"
    profiles.mkdir(parents=True)
    for name, profile in PROFILES.items():
        profile.save(profiles / f"{name}.yaml")
    log = folder / "log"
    command = [STEER, "serve", model, "--port", "0", "--profile", str(profiles), "--max-body", str(max_body)]
    command += ["--engine", engine]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        end = time.monotonic() + START
        while READY not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"steer serve did not start:\n{log.read_text()}")
            time.sleep(0.1)
        url = next(line.split()[0] for line in log.read_text().splitlines() if READY in line)
        yield Served(url, psutil.Process(process.pid), log, engine)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def under_load(server: Served, live: SteeredModel, seconds: float, clients: int) -> Load:
    """Everybody asks, first one reply to warm up, then until the time is over and the last replies are there."""
    traits = [Trait.load(name) for name in ("moralizing", "compliance")]
    topics = [text for of in (*traits, NeutralPrompts.load()) for text in (*of.held_out, *of.fit)]
    office = Office(server.url, server.name(), sorted(live.end_token_ids), clients, seconds)
    asked = [asks(c, topics[c::clients], office.ends) for c in range(clients)]
    everybody = [threading.Thread(target=office.chats, args=[a], daemon=True) for a in asked]
    everybody += [threading.Thread(target=work, daemon=True) for work in (office.leaves, office.sends_rubbish)]
    for thread in everybody:
        thread.start()
    office.warm.wait()
    seen: list[tuple[float, float, float, int]] = []
    while not office.over:
        written = server.metrics()["steer_completion_tokens_total"]
        cpu = sum(server.process.cpu_times()[:2])
        seen.append((time.monotonic(), written, cpu, server.process.memory_info().rss))
        time.sleep(0.5)
    patient_until = time.monotonic() + PATIENCE
    for thread in everybody:
        thread.join(max(0.0, patient_until - time.monotonic()))
    if any(thread.is_alive() for thread in everybody):
        office.problems.append(f"somebody still waits {PATIENCE} s after the time was over")
    end = time.monotonic() + 10
    while (left := _left(totals := server.metrics())) and time.monotonic() < end:
        time.sleep(0.1)
    lines = [x for x in server.log.read_text().splitlines() if not any(fine in x for fine in LOGGED)]
    office.problems += [
        f"log: {x}" for x in lines if server.engine == "transformers" or any(word in x for word in TROUBLE)
    ]
    lasted, wrote, worked = (b - a for a, b in zip(seen[0][:3], seen[-1][:3], strict=True))
    part, rss = max(1, len(seen) // 3), [row[3] for row in seen]
    return Load(
        office.replies,
        office.problems,
        office.begun,
        rate=wrote / lasted,
        cpu=worked / wrote,
        memory=(statistics.median(rss[:part]), statistics.median(rss[-part:])),
        left=left,
        hung_up=(office.hung_up, totals.get("steer_hung_up_total", 0.0)),
        rubbish=office.rubbish,
        failed=sum(n for name, n in totals.items() if name.startswith("steer_requests_total") and _status(name) >= 500),
    )


def _left(totals: dict[str, float]) -> float:
    return totals["steer_jobs_running"] + totals["steer_jobs_waiting"]


def _status(sample: str) -> int:
    return int(sample.rpartition(" ")[2])

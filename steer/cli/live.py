"""The verbs that run the model: chat, calibrate, serve, ui.

Each loads the model and hands it to the package: `steer.chat.terminal`, `steer.measure.calibrate`,
`steer.serve.server`, or streamlit with `steer/cli/page.py`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steer.cli.common import (
    ChatTemplate,
    DeviceMap,
    Dtype,
    FourBit,
    Json,
    Model,
    NoThink,
    emit,
    say,
    unicode_option,
)
from steer.errors import UsageError
from steer.files import check_writable
from steer.plain_text import plain_line

if TYPE_CHECKING:
    from steer.chat.session import Session
    from steer.core.sampler import Sampler

_Server = Annotated[
    str | None, typer.Option(help="Talk to the model that `steer serve` runs at this URL; its key is STEER_API_KEY.")
]
PAGE = Path(__file__).with_name("page.py")
"""The script that streamlit runs."""


def chat(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint directory or hub id; with --server, one of its models.")
    ] = None,
    server: _Server = None,
    slider: Annotated[list[str], typer.Option(help="NAME=AMOUNT or NAME:OPERATION=AMOUNT; may be repeated.")] = [],  # noqa: B006
    profile: Annotated[Path | None, typer.Option(help="A profile: sliders and a sampler, in YAML.")] = None,
    card: Annotated[Path | None, typer.Option(help="A character card, PNG, WEBP or JSON: who the model plays.")] = None,
    lorebook: Annotated[
        list[Path], typer.Option(help="A lorebook, JSON: texts that the model reads where the chat names them.")
    ] = [],  # noqa: B006
    user: Annotated[str, typer.Option(help="Your name, for {{user}} in a card.", callback=unicode_option)] = "You",
    persona: Annotated[str, typer.Option(help="Who you are, for {{persona}} in a card.", callback=unicode_option)] = "",
    system: Annotated[str | None, typer.Option(help="System prompt.", callback=unicode_option)] = None,
    sampler: Annotated[str | None, typer.Option(help="greedy, plain, wild or near-greedy.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    no_think: NoThink = False,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    four_bit: FourBit = False,
) -> None:
    """Talk to a model with its sliders at hand: /moralizing 0.5, /sliders, /undo, /receipt, /help, /quit."""
    from steer.core.cards import load_card
    from steer.core.lorebook import load_lorebook
    from steer.core.profile import Profile
    from steer.core.sampler import preset
    from steer.core.slider import parse_amounts

    amounts = parse_amounts(slider)
    chosen = replace(preset(sampler or "plain"), max_new_tokens=max_new_tokens, seed=seed)
    if temperature is not None:
        chosen = replace(chosen, temperature=temperature)
    loaded_card = None if card is None else load_card(card, user=user, persona=persona, seed=seed)
    books = [load_lorebook(path) for path in lorebook]
    for warning in (*(loaded_card.warnings if loaded_card else ()), *(w for b in books for w in b.warnings)):
        typer.echo(plain_line(warning), err=True)
    loaded_profile = None if profile is None else Profile.load(profile)
    session = _session(model, server, chosen, device_map, four_bit, no_think)
    if loaded_card is not None:
        session.play(loaded_card)
    for book in books:
        session.add_lorebook(book)
    if loaded_profile is not None:
        session.use(loaded_profile)
    if sampler is not None or temperature is not None:
        session.sampler = chosen  # options override the profile's sampler
    if system is not None:
        session.system = system
    for name, amount in amounts.items():
        session.sliders[name] = amount
    from steer.chat.terminal import run_chat

    answered = run_chat(session)
    if not answered and not sys.stdin.isatty():
        raise typer.Exit(1)  # a script cannot tell a mistake's line from a reply


def _session(
    model: str | None, server: str | None, sampler: Sampler, device_map: str | None, four_bit: bool, no_think: bool
) -> Session:
    """Return a chat with a model in this process, or with one behind a server."""
    from steer.chat.session import Session

    if server is not None:
        from steer.chat.remote import RemoteBackend

        remote = RemoteBackend(server, os.environ.get("STEER_API_KEY"), model)
        remote.template_options = {"enable_thinking": False} if no_think else {}
        return Session(remote, sampler=sampler)
    if model is None:
        raise UsageError("chat: expected a model, or --server, found neither; name a checkpoint")
    from steer.model.compile_limits import keep_few_shapes
    from steer.model.loaded import WITHOUT_THOUGHTS
    from steer.model.steered import load

    keep_few_shapes()
    live = load(model, device_map=device_map, four_bit=four_bit)
    live.template_options = dict(WITHOUT_THOUGHTS) if no_think else {}
    return Session(live, sampler=sampler, sliders=live.sliders)


def calibrate(
    model: Model,
    profile: Annotated[Path, typer.Option(help="The profile; its ranges are written into it.")],
    max_kl: Annotated[float | None, typer.Option(help="Most nats per token on neutral text.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the profile here instead.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the replies.")] = 0,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    four_bit: FourBit = False,
    as_json: Json = False,
) -> None:
    """Find how far each slider of a profile can be moved before replies come apart, and write it into the profile."""
    from steer.core.profile import Profile

    given = Profile.load(profile)
    check_writable(out or profile)
    from steer.measure.calibrate import Limits, expected_tokens
    from steer.measure.calibrate import calibrate as run
    from steer.model.steered import load
    from steer.progress import bar
    from steer.verbs.tables import calibration_table

    live = load(model, device_map=device_map, four_bit=four_bit)
    limits = Limits() if max_kl is None else Limits(kl=max_kl)
    with bar("calibrating", expected_tokens(len(given.sliders)), "tokens") as advance:
        found = run(live, given, limits=limits, seed=seed, on_tokens=advance)
    place = found.applied(given).save(out or profile)
    emit({"profile": str(place), **found.as_json()}, as_json, f"{calibration_table(found)}\n{place}")


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines reach requires --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any free one.")] = 8321,
    api_key: Annotated[
        str | None, typer.Option(envvar="STEER_API_KEY", help="Key that every request must send.")
    ] = None,
    profile: Annotated[
        list[Path], typer.Option(help="A profile, or a folder of them; may be repeated. Each is offered as a model.")
    ] = [],  # noqa: B006
    max_running: Annotated[int, typer.Option(help="Replies that are written at the same time.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Replies that may wait; more are refused with status 429.")] = 64,
    context: Annotated[
        int | None, typer.Option(help="Most tokens of a prompt and its reply; by default the model's context.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of one reply; by default what the context leaves.")
    ] = None,
    max_body: Annotated[int, typer.Option(help="Most bytes of one request.")] = 4 * 2**20,
    max_messages: Annotated[int, typer.Option(help="Most messages of one chat.")] = 1000,
    allow_host: Annotated[
        list[str], typer.Option(help="Another name of this machine, as host.docker.internal; may be repeated.")
    ] = [],  # noqa: B006
    allow_origin: Annotated[
        list[str], typer.Option(help="A web page that may use the server, as https://example.org; may be repeated.")
    ] = [],  # noqa: B006
    any_model_name: Annotated[
        bool, typer.Option("--any-model-name", help="Take unknown names, as gpt-4o, for the served model.")
    ] = False,
    allow_find: Annotated[
        bool, typer.Option("--allow-find", help="Let clients make new sliders: POST /v1/steering/sliders.")
    ] = False,
    keep_alive: Annotated[
        Literal["chunks", "comments"], typer.Option(help="What a stream sends while there is no text.")
    ] = "chunks",
    no_think: NoThink = False,
    engine: Annotated[
        Literal["transformers", "vllm", "llama.cpp"],
        typer.Option(help="What writes the replies; vllm needs steer[vllm], llama.cpp a running llama-server."),
    ] = "transformers",
    url: Annotated[
        str | None, typer.Option(help="llama.cpp: the llama-server's address; its key is LLAMA_API_KEY.")
    ] = None,
    baked: Annotated[
        list[Path],
        typer.Option(help="llama.cpp: output of bake --as gguf, if llama-server is elsewhere; may be repeated."),
    ] = [],  # noqa: B006
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    four_bit: FourBit = False,
) -> None:
    """Answer OpenAI's API with sliders in every request: SillyTavern, the openai client, curl."""
    from steer.model.compile_limits import keep_few_shapes
    from steer.serve.limits import Limits
    from steer.serve.server import Options, load_profiles
    from steer.serve.server import serve as run

    keep_few_shapes()
    limits = Limits(max_body, max_messages, tokens=max_tokens)
    options = Options(
        host, api_key, load_profiles(profile), limits, allow_host, allow_origin, any_model_name, allow_find, keep_alive
    )
    from steer.checkpoint.fetch import resolve
    from steer.model.loaded import WITHOUT_THOUGHTS
    from steer.model.steered import describe, load
    from steer.serve.batching import BatchingEngine
    from steer.serve.packed import check_files

    if engine != "transformers" and (device_map is not None or four_bit):
        raise UsageError(f"--engine {engine}: expected neither --device-map nor --four-bit, found one; leave it out")
    if (engine == "llama.cpp") != (url is not None) or (baked and url is None):
        raise UsageError(f"--engine {engine}: expected --url beside llama.cpp alone; give the llama-server's address")
    if engine == "vllm":
        make, live = partial(_vllm_engine(), place=resolve(model)), describe(model)
    elif url is not None:
        from steer.serve.llama_cpp.engine import LlamaCppEngine

        key = os.environ.get("LLAMA_API_KEY")
        make = partial(LlamaCppEngine, url=url, place=Path(resolve(model)), baked=baked, api_key=key)
        live = describe(model)
    else:
        check_files(resolve(model), model)
        make, live = BatchingEngine, load(model, device_map=device_map, four_bit=four_bit)
    live.template_options = dict(WITHOUT_THOUGHTS) if no_think else {}
    run(
        live, port=port, options=options, max_running=max_running, max_waiting=max_queue, context=context,
        ready=lambda url: typer.echo(f"{url}  (Ctrl-C stops)", err=True), engine=make,
    )  # fmt: skip


def _vllm_engine() -> Any:
    """The class VllmEngine. Errors: UsageError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UsageError("--engine vllm: expected the package vllm, found none; make vllm, or pip install vllm")
    from steer.serve.vllm.engine import VllmEngine

    return VllmEngine


def ui(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint directory or hub id; without one the page offers the default merge."),
    ] = None,
    server: _Server = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8501,
    headless: Annotated[bool, typer.Option("--headless", help="Open no browser.")] = False,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    four_bit: FourBit = False,
) -> None:
    """Open the slider chat in the browser."""
    if model is not None and server is not None:
        raise UsageError(f"ui: expected a model or --server, found {model} and {server}; leave one out")
    from steer.checkpoint.fetch import resolve

    named = [resolve(model)] if model is not None else [] if server is None else ["--server", server]
    if device_map is not None:
        named += ["--device-map", device_map]
    if four_bit:
        named += ["--four-bit"]
    command = [
        sys.executable, "-m", "streamlit", "run", str(PAGE), "--server.address", "127.0.0.1",
        "--server.allowedHosts", "localhost", "--server.allowedHosts", "127.0.0.1",
        "--server.port", str(port), "--server.headless", str(headless).lower(),
        # Without this, the first start on a machine asks for an e-mail address, and the page waits for the answer.
        "--server.showEmailPrompt", "false",
        # The file watcher would import every module of transformers, even those whose libraries are not installed.
        "--server.fileWatcherType", "none", "--browser.gatherUsageStats", "false",
        "--client.toolbarMode", "viewer", "--client.showErrorDetails", "none",
        # With its welcome goes the advert for agent skills over a corner of the page; the address is printed here.
        "--logger.hideWelcomeMessage", "true",
        # Streamlit's default colour is the red that means "too far" on a slider.
        "--theme.light.primaryColor", "#3d63c9", "--theme.dark.primaryColor", "#86a3f5", "--", *named,
    ]  # fmt: skip
    say(f"The page is at http://127.0.0.1:{port} (Ctrl-C ends it)")
    # Replaces this process, so that stopping `steer ui` stops the page itself.
    os.execv(sys.executable, command)

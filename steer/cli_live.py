"""The verbs that run the model: chat, ui."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli_common import Model

if TYPE_CHECKING:
    from steer.values.sampler import Sampler

_Slider = Annotated[list[str], typer.Option("--slider", help="NAME=AMOUNT or NAME:OPERATION=AMOUNT; may be repeated.")]
_Profile = Annotated[Path | None, typer.Option(help="A profile: sliders and a sampler, in YAML.")]


def chat(
    model: Model,
    slider: _Slider = [],  # noqa: B006
    profile: _Profile = None,
    card: Annotated[Path | None, typer.Option(help="A character card, PNG or JSON: who the model plays.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    sampler: Annotated[str | None, typer.Option(help="greedy, plain, wild or near-greedy.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the sampling; 0 is greedy.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Reply length at most.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Talk to a model with its sliders at hand: /moralizing 0.5, /sliders, /undo, /receipt, /help, /quit."""
    from steer.values.cards import load_card
    from steer.values.profile import Profile
    from steer.values.slider import parse_amount

    amounts = dict(parse_amount(s) for s in slider)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    chosen = _sampler(sampler, settings | ({} if temperature is None else {"temperature": temperature}))
    played = None if card is None else load_card(card)
    gone_by = None if profile is None else Profile.load(profile)
    from steer.live.model import load
    from steer.live.session import Session
    from steer.live.terminal import run_chat

    live = load(model)
    session = Session(live, sampler=chosen, sliders=live.sliders)
    if played is not None:
        session.play(played)
    if gone_by is not None:
        session.use(gone_by)
    if sampler is not None or temperature is not None:
        session.sampler = chosen  # what is asked for here goes before a profile's
    if system is not None:
        session.system = system
    for name, amount in amounts.items():
        live.sliders[name] = amount
    run_chat(session)


def ui(
    model: Model,
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 8501,
    headless: Annotated[bool, typer.Option("--headless", help="Open no browser.")] = False,
) -> None:
    """Open the slider chat in the browser."""
    page = Path(__file__).parents[1] / "app.py"
    from steer.weights.fetch import resolve

    command = [
        sys.executable, "-m", "streamlit", "run", str(page), "--server.address", "127.0.0.1",
        "--server.port", str(port), "--server.headless", str(headless).lower(),
        # Watching files would import every module of transformers, those too whose libraries are not here.
        "--server.fileWatcherType", "none", "--browser.gatherUsageStats", "false",
        "--client.toolbarMode", "viewer", "--", resolve(model),
    ]  # fmt: skip
    # In this process's place: whoever stops `steer ui` stops the page, not only its parent.
    os.execv(sys.executable, command)


def _sampler(name: str | None, settings: dict[str, Any]) -> Sampler:
    from dataclasses import replace

    from steer.values.sampler import preset

    return replace(preset(name or "plain"), **settings)


def register(app: typer.Typer) -> None:
    """Put the verbs on the command line."""
    app.command(epilog="Examples: `steer chat merged --slider moralizing=-1` · `steer chat merged --card duke.png`")(
        chat
    )
    app.command(epilog="Example: `steer ui merged`")(ui)

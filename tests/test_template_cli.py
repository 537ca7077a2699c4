"""--chat-template and --no-think on the command line, from a base model without a template to its bake."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command, command_here
from test_dtype_cli import COMMANDS
from tiny_chat import TEMPLATE, save_tiny_chat

from steer.core.direction import Direction
from steer.model.steered import load


@pytest.fixture
def steer(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    return command_here(monkeypatch, capfd)


@pytest.fixture
def base(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint without a chat template."""
    place = save_tiny_chat(tiny_llama, tmp_path / "base", eos=None, eos_token_id=None)
    (place / "chat_template.jinja").unlink()
    assert "chat_template" not in json.loads((place / "tokenizer_config.json").read_text())
    return place


def test_the_option_is_wherever_a_model_is_loaded() -> None:
    taken = {name: set(inspect.signature(verb).parameters) for name, verb in COMMANDS.items() if verb is not None}
    assert {n for n, o in taken.items() if "chat_template" in o} == {n for n, o in taken.items() if "dtype" in o}
    assert {n for n, o in taken.items() if "no_think" in o} == {"chat", "find", "serve"}


def test_a_base_model_without_a_template_says_what_is_missing_and_chats_with_one(steer: Command, base: Path) -> None:
    done = steer("chat", base, "--max-new-tokens", 4)
    said = done.out.strip()
    assert done.code == 1  # in a pipe, where nothing else tells it from a reply
    assert "\n" not in said
    assert "expected a chat template in the tokenizer, found none" in said
    assert "--chat-template (alpaca, chatml, gemma, llama3, mistral, plain, or a file)" in said


def test_it_chats_with_a_template_that_ships(steer: Command, base: Path) -> None:
    done = steer("chat", base, "--max-new-tokens", 4, "--temperature", 0, "--chat-template", "plain")
    assert done.code == 0
    assert done.out.strip() == load(base, chat_template="plain").chat("hello", temperature=0, max_new_tokens=4).strip()
    wrong = steer("chat", base, "--chat-template", "chatlm")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "--chat-template chatlm: expected a file, or one of alpaca" in wrong.err


def test_a_bake_keeps_it(steer: Command, base: Path, make_direction: Callable[..., Direction], tmp_path: Path) -> None:
    file, out = make_direction().save(tmp_path / "d.safetensors"), tmp_path / "out"
    done = steer("bake", base, out, "--add", f"{file}=0.5", "--force", "--chat-template", "alpaca")
    assert done.code == 0, done.err
    hello = [{"role": "user", "content": "hello"}]
    assert load(out).prompt_ids(hello) == load(base, chat_template="alpaca").prompt_ids(hello)
    assert steer("verify", out).code == 0


@pytest.mark.parametrize("options", [(), ("--no-think",)])
def test_no_think_reaches_the_template(
    steer: Command, tiny_llama: Callable[..., Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    opened = "{% if add_generation_prompt and enable_thinking is not false %}<think> {% endif %}"
    place = save_tiny_chat(tiny_llama, tmp_path / "m", template=TEMPLATE + opened, eos=None, eos_token_id=None)
    said = steer("chat", place, "--max-new-tokens", 4, "--temperature", 0, *options).out
    assert said.startswith("<think>") == (not options)
    assert said.strip()

"""What is kept of a chat from reply to reply: what was read, under the sliders of that moment, or all of it anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from slow_steering import EXACT, Slow, close_directions, exact, watched
from tiny_chat import save_tiny_chat
from torch import Tensor

from steer.chat.session import Session
from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.model.decode import decode
from steer.model.kv_cache import PrefixCache, growing_cache
from steer.model.steered import SteeredModel, load

GREEDY = Sampler(max_new_tokens=6, temperature=0, repetition_penalty=1.0)
D = close_directions()
BEFORE = Edit.of([Slider(D[0], "add", 1.5), Slider(D[1], "clamp", 0.5, Schedule("reply"))])
AFTER = Edit.of([Slider(D[2], "clamp", -1.0, Schedule(ramp=3)), Slider(D[3], "ablate", 1.0)])
STEADY = Edit.of([Slider(D[0], "add", 1.5), Slider(D[1], "clamp", 0.5), Slider(D[3], "ablate", 0.5)])
"""Acts on every token alike. What acts on a reply alone acts on others when that reply has become part of a prompt."""
FIRST = [1, 4, 20, 33, 9, 5]


def reply(
    model: SteeredModel, prompt: list[int], edit: Edit | None, memory: PrefixCache | None = None, **more: int
) -> tuple[list[int], Tensor]:
    """A reply's tokens, and the logits that they were chosen by."""
    with model.steering.applied([edit]), watched(model) as seen:
        made = [s.tokens[0] for s in decode(model, [prompt], GREEDY, memory=memory, **more)]
    return made, torch.cat(seen)


def same(a: tuple[list[int], Tensor], b: tuple[list[int], Tensor]) -> bool:
    return a[0] == b[0] and float((a[1] - b[1]).abs().max()) < EXACT


def holds_what_it_claims(model: SteeredModel, memory: PrefixCache, edit: Edit, prompt: int) -> None:
    """The cache is that of its ids, read in one pass."""
    held, rest = memory.recall([*memory.ids, 0], model.hf.config)
    assert rest == [0]
    slow, fresh = Slow(model, lambda t: edit.as_moves(), prompt), growing_cache(model.hf.config)
    handle = model.hf.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"past_key_values": fresh, "use_cache": True}), with_kwargs=True
    )
    slow.logits(memory.ids)
    handle.remove()
    for mine, wanted in zip(held.layers, fresh.layers, strict=True):
        torch.testing.assert_close(mine.keys, wanted.keys, rtol=0, atol=EXACT)
        torch.testing.assert_close(mine.values, wanted.values, rtol=0, atol=EXACT)


def test_what_was_read_is_not_read_again_and_nothing_changes_by_it(exact_endless):
    memory = PrefixCache()
    first = reply(exact_endless, FIRST, STEADY, memory)
    assert same(first, reply(exact_endless, FIRST, STEADY))
    assert memory.read == len(FIRST) + 5
    second = [*FIRST, *first[0], 2, 4, 31, 5]
    assert same(reply(exact_endless, second, STEADY, memory), reply(exact_endless, second, STEADY))
    assert memory.read == 1 + 4 + 5  # the last token of the reply, the message, the new reply but for its last
    assert memory.ids[: len(second)] == second
    assert STEADY is not None
    holds_what_it_claims(exact_endless, memory, STEADY, len(second))


def test_a_prompt_asked_again_reads_one_token_at_least(exact_endless):
    memory = PrefixCache()
    first = reply(exact_endless, FIRST, None, memory)
    assert same(reply(exact_endless, FIRST, None, memory), first)
    assert memory.read == 1 + 5


def test_a_slider_that_moved_acts_from_here_on_and_what_was_read_stays_as_it_was(exact_endless):
    assert BEFORE is not None
    assert AFTER is not None
    memory = PrefixCache()
    made = reply(exact_endless, FIRST, BEFORE, memory)[0]
    read = len(FIRST) + len(made) - 1
    second = [*FIRST, *made, 2, 4, 31, 5]
    tokens, logits = reply(exact_endless, second, AFTER, memory)
    # The reference: each token under the sliders, and in the reply under those of that moment.
    old = Slow(exact_endless, lambda t: BEFORE.as_moves(), len(FIRST))
    new = Slow(exact_endless, lambda t: AFTER.as_moves(), len(second))
    mixed = _Mixed(exact_endless, lambda t: (), 0)
    mixed.parts = lambda t: old if t < read else new
    wanted = mixed.logits(second + tokens[:-1])[len(second) - 1 :]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=EXACT)
    fresh = reply(exact_endless, second, AFTER)
    assert float((fresh[1][0] - logits[0]).abs().max()) > 0.01
    memory.forget()
    assert same(reply(exact_endless, second, AFTER, memory), fresh)


class _Mixed(Slow):
    """Tokens of several replies, each under the moves and the prompt of its reply."""

    parts: Callable[[int], Slow]

    def _share(self, m: Slider, t: int) -> float:
        return self.parts(t)._share(m, t)

    def __getattribute__(self, name: str):
        if name == "moves":
            return lambda t: self.parts(t).moves(t)
        return super().__getattribute__(name)


@pytest.mark.parametrize("at", [1, 3])
def test_reread_in_mid_reply_is_a_fresh_read_of_the_chat_and_the_reply_so_far(exact_endless, at):
    memory = PrefixCache()
    exact_endless.steering.set([BEFORE])
    with watched(exact_endless) as seen:
        steps = decode(exact_endless, [FIRST], GREEDY, memory=memory)
        made = [next(steps).tokens[0] for _ in range(at)]
        exact_endless.steering.set([AFTER])
        memory.forget()
        made += [s.tokens[0] for s in steps]
    exact_endless.steering.set([None])
    assert memory.read == len(FIRST) + at - 1 + len(FIRST) + 5
    fresh = reply(exact_endless, FIRST + made[:at], AFTER, begun=at)
    assert fresh[0][: GREEDY.max_new_tokens - at] == made[at:]
    torch.testing.assert_close(torch.cat(seen)[at:], fresh[1][: GREEDY.max_new_tokens - at], rtol=0, atol=EXACT)
    assert AFTER is not None
    holds_what_it_claims(exact_endless, memory, AFTER, len(FIRST))


def test_a_chat_that_was_changed_is_read_again_from_the_change_on(exact_endless):
    memory = PrefixCache()
    made = reply(exact_endless, FIRST, STEADY, memory)[0]
    changed = [*FIRST[:3], 40, *FIRST[4:], *made, 2, 4, 31, 5]
    assert same(reply(exact_endless, changed, STEADY, memory), reply(exact_endless, changed, STEADY))
    assert memory.read == len(changed) - 3 + 5
    assert memory.ids[: len(changed)] == changed
    # Shorter than what is held, and another chat altogether.
    assert same(reply(exact_endless, FIRST[:3], STEADY, memory), reply(exact_endless, FIRST[:3], STEADY))
    assert same(reply(exact_endless, [7, 8, 9], STEADY, memory), reply(exact_endless, [7, 8, 9], STEADY))
    assert memory.read == 3 + 5


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_reply_that_is_stopped_leaves_a_memory_of_what_was_read(exact_endless, stop):
    assert BEFORE is not None
    memory = PrefixCache()
    with exact_endless.steering.applied([BEFORE]):
        steps = decode(exact_endless, [FIRST], GREEDY, memory=memory)
        made = [next(steps).tokens[0] for _ in range(stop)]
        steps.close()
    assert memory.ids == FIRST + made[:-1]
    holds_what_it_claims(exact_endless, memory, BEFORE, len(FIRST))


@pytest.mark.parametrize("token", [0, 2])
@pytest.mark.parametrize("block", [0, 2])
def test_a_pass_that_is_broken_off_is_not_taken_for_read(exact_endless, token, block):
    memory, passes = PrefixCache(), []

    def fail(module: object, args: object, output: object) -> None:
        passes.append(1)
        if len(passes) == token + 1:
            raise KeyboardInterrupt

    reply(exact_endless, FIRST[:2], STEADY, memory)
    handle = exact_endless.hf.get_submodule(exact_endless.anatomy.block_module(block)).register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        reply(exact_endless, FIRST, STEADY, memory)
    handle.remove()
    second = [*memory.ids, 31, 5]
    assert same(reply(exact_endless, second, STEADY, memory), reply(exact_endless, second, STEADY))
    assert same(reply(exact_endless, FIRST, STEADY, memory), reply(exact_endless, FIRST, STEADY))


def test_a_window_that_has_let_tokens_go_is_read_again(tiny_llama: Callable[..., Path], tmp_path: Path):
    place = save_tiny_chat(tiny_llama, tmp_path / "mistral", architecture="Mistral", sliding_window=8)
    model = exact(load(place, dtype=torch.float64))
    model.end_token_ids = frozenset()
    memory = PrefixCache()
    # Cut while all of it is held; then whatever does not go on from where it was is read anew.
    for prompt, read in ((FIRST[:2], 2), ([1, 4, 31], 1), (FIRST, 6), ([*FIRST, 31], 7), (FIRST[:4], 4)):
        assert same(reply(model, prompt, STEADY, memory), reply(model, prompt, STEADY))
        assert memory.read == read + 5
    onwards = [*memory.ids, 31, 32]
    assert same(reply(model, onwards, STEADY, memory), reply(model, onwards, STEADY))
    assert memory.read == 2 + 5


SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}


@pytest.mark.parametrize("foreign", [{"sliding_window": 8}, {"attention_chunk_size": 8}, SLIDING], ids=str)
def test_a_window_in_the_config_that_the_architecture_does_not_read_cuts_no_cache(
    tiny_llama: Callable[..., Path], change_config: Callable[..., None], tmp_path: Path, foreign: dict[str, object]
):
    """As in a Llama that was converted from a Mistral."""
    place = save_tiny_chat(tiny_llama, tmp_path / "m")
    plain = exact(load(place, dtype=torch.float64))
    change_config(place, **foreign)
    model = exact(load(place, dtype=torch.float64))
    prompt = [1, *range(4, 24)]
    assert same(reply(model, prompt, STEADY), reply(plain, prompt, STEADY))


# Sessions


def pieces_of(session: Session, text: str) -> tuple[str, Tensor]:
    with watched(session.model) as seen:
        said = "".join(session.reply(text))
    return said, torch.cat(seen)


def test_a_session_reads_a_message_once_and_all_of_it_again_when_asked(exact_endless):
    sessions = [Session(exact_endless, sampler=GREEDY) for _ in range(2)]
    for session in sessions:
        session.sliders.put(Slider(D[0], "scale"), 2.0)
        pieces_of(session, "hello friend")
        session.sliders["d0"] = -1.0
    kept, again = sessions
    assert kept.messages == again.messages
    again.reread()
    logits = [pieces_of(s, "well")[1] for s in sessions]
    assert kept.backend.memory.read < again.backend.memory.read
    assert float((logits[0][0] - logits[1][0]).abs().max()) > 0.01
    fresh = Session(exact_endless, sampler=GREEDY)
    fresh.sliders.put(Slider(D[0], "scale"), -1.0)
    fresh.messages = [dict(m) for m in again.messages[:2]]
    torch.testing.assert_close(pieces_of(fresh, "well")[1], logits[1], rtol=0, atol=EXACT)


def test_a_session_whose_earlier_message_was_edited_answers_as_if_it_had_always_been_so(exact_endless):
    session, fresh = (Session(exact_endless, sampler=GREEDY) for _ in range(2))
    for s in (session, fresh):
        s.sliders.put(D[0], 1.0)
    for text in ("hello friend", "well"):
        pieces_of(session, text)
    session.messages[2]["content"] = "lie truth"
    fresh.messages = [dict(m) for m in session.messages]
    a, b = pieces_of(session, "yes"), pieces_of(fresh, "yes")
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=EXACT)
    assert a[0] == b[0]
    assert session.backend.memory.read < fresh.backend.memory.read


def test_a_session_that_was_cleared_remembers_nothing(exact_endless):
    session = Session(exact_endless, sampler=GREEDY)
    first = pieces_of(session, "hello")
    session.clear()
    assert (session.messages, session.receipts, session.backend.memory.ids) == ([], [], [])
    again = pieces_of(session, "hello")
    assert again[0] == first[0]
    assert torch.equal(again[1], first[1])


def test_a_reply_stopped_midway_is_gone_on_from_what_was_read(exact_endless):
    session, fresh = (Session(exact_endless, sampler=GREEDY) for _ in range(2))
    pieces = session.reply("hello")
    said = next(pieces) + next(pieces)
    pieces.close()
    fresh.messages = [dict(m) for m in session.messages]
    assert session.messages[-1]["content"] == said
    torch.testing.assert_close(pieces_of(session, "well")[1], pieces_of(fresh, "well")[1], rtol=0, atol=EXACT)

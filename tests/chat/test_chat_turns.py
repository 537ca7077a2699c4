"""Turns on a model are handed on in the order they were asked for."""

from __future__ import annotations

import threading

import pytest

from steer.chat.local import Turns, turns_of


def test_threads_that_always_want_another_turn_get_them_one_after_the_other():
    turns, order, begin = Turns(), [], threading.Barrier(3)

    def work(name: int) -> None:
        begin.wait()
        for _ in range(50):
            with turns.turn():
                order.append(name)
                while turns.waiting < len({t for t in threads if t.is_alive()}) and order.count(name) < 40:
                    pass  # the others stand in line

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
        assert not t.is_alive()
    middle = order[6:90]
    assert all(set(middle[i : i + 3]) == {0, 1, 2} for i in range(0, len(middle), 3))


def test_an_exception_hands_the_turn_on():
    turns = Turns()
    try:
        with turns.turn():
            raise ValueError
    except ValueError:
        pass
    with turns.turn():
        assert turns.waiting == 1
    assert turns.waiting == 0


def test_whoever_is_interrupted_while_waiting_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, after = Turns(), threading.Event()

    def interrupted(self: threading.Condition, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    with turns.turn():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Condition, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt), turns.turn():
                pytest.fail("it is somebody else's turn")
        assert turns.waiting == 1

    def next_one() -> None:
        with turns.turn():
            after.set()

    thread = threading.Thread(target=next_one, daemon=True)
    thread.start()
    thread.join(10)
    assert after.is_set()
    assert turns.waiting == 0


def test_all_chats_of_a_model_share_its_turns(model):
    assert turns_of(model) is turns_of(model)

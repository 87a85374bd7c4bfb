"""Turns and stamps."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from droidspeak.storage.changes import Changes
from droidspeak.storage.testing import make_key

from .gates import eventually

KEY, OTHER = make_key(0), make_key(1)


@pytest.fixture
def changes() -> Changes:
    return Changes()


def test_changes_of_one_key_take_turns(changes: Changes) -> None:
    inside: list[int] = []

    def change(n: int) -> None:
        with changes.turn(KEY):
            inside.append(n)
            time.sleep(0.001)
            assert inside == [n]
            inside.clear()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(change, n) for n in range(50)]:
            done.result(30)
    assert not changes._turns


def test_turns_come_in_the_order_in_which_they_were_asked_for(changes: Changes) -> None:
    order: list[int] = []

    def change(n: int) -> None:
        with changes.turn(KEY):
            order.append(n)

    with ThreadPoolExecutor(8) as pool, changes.turn(KEY):
        for n in range(8):
            pool.submit(change, n)
            assert eventually(lambda n=n: len(changes._turns[KEY]) == n + 2)
    assert order == list(range(8))


def test_other_keys_do_not_wait(changes: Changes) -> None:
    with changes.turn(KEY), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: changes.turn(OTHER).__enter__()).result(10)


def test_the_stamp_changes_at_the_end_of_a_turn(changes: Changes) -> None:
    before = changes.stamp(KEY)
    with changes.turn(KEY):
        assert changes.stamp(KEY) == before
    assert changes.stamp(KEY) != before


def test_a_turn_that_fails_counts_and_ends(changes: Changes) -> None:
    before = changes.stamp(KEY)
    with pytest.raises(KeyError), changes.turn(KEY):
        raise KeyError
    assert changes.stamp(KEY) != before
    entered = threading.Event()
    with changes.turn(KEY):
        entered.set()
    assert entered.is_set()

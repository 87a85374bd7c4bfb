"""Threads with deadlines: what they make, what they keep, and how they end."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from droidspeak.errors import TierClosed, TierTimeout
from droidspeak.storage.deadline import DeadlineThreads

from .gates import eventually


class Given:
    """What a call is given; it can be watched."""


@pytest.fixture
def one() -> Iterator[DeadlineThreads]:
    threads = DeadlineThreads(1, "tier one")
    yield threads
    threads.close(lambda: None, 10)
    assert eventually(lambda: running() == 0)


@pytest.fixture
def gate(one: DeadlineThreads) -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What only the collector would free stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def hang(threads: DeadlineThreads, gate: threading.Event) -> None:
    """Leaves a call behind that ends with `gate`."""
    with pytest.raises(TierTimeout, match=r"^tier one did not answer within 0\.01 s$"):
        threads.run(lambda: gate.wait(30), 0.01)


def running() -> int:
    return sum(thread.name == "droidspeak tier one" for thread in threading.enumerate())


def test_gives_the_answer_or_the_error(one: DeadlineThreads) -> None:
    assert one.run(lambda: 7, 10) == 7
    with pytest.raises(ZeroDivisionError):
        one.run(lambda: 1 // 0, 10)


def test_threads_are_started_when_they_are_needed() -> None:
    many = DeadlineThreads(16, "tier one")
    assert running() == 0
    for _ in range(5):
        many.run(lambda: None, 10)
        assert eventually(lambda: many._outstanding == 0)
    assert running() == 1
    many.close(lambda: None, 10)
    assert eventually(lambda: running() == 0)


@pytest.mark.usefixtures("_no_collector")
def test_a_call_that_has_not_begun_lets_go_at_once(one: DeadlineThreads, gate: threading.Event) -> None:
    hang(one, gate)
    held = _watch(lambda given: _timed_out(one, given))
    assert held() is None


def _timed_out(threads: DeadlineThreads, given: Given) -> None:
    with pytest.raises(TierTimeout):
        threads.run(lambda: given, 0.01)


def _watch(use: Callable[[Given], None]) -> weakref.ref[Given]:
    given = Given()
    use(given)
    return weakref.ref(given)


@pytest.mark.usefixtures("_no_collector")
def test_neither_an_answer_nor_an_error_is_kept(one: DeadlineThreads) -> None:
    def answer(given: Given) -> None:
        assert one.run(lambda: given, 10) is given

    def error(given: Given) -> None:
        try:
            one.run(lambda: _fails(given), 10)
        except KeyError:
            return

    for use in (answer, error):
        held = _watch(use)
        assert eventually(lambda held=held: held() is None), use


def _fails(given: Given) -> None:
    raise KeyError(given)


def test_the_last_call_comes_after_all_others(one: DeadlineThreads, gate: threading.Event) -> None:
    made: list[str] = []
    hang(one, gate)
    with pytest.raises(TierTimeout):
        one.close(lambda: made.append("last"), 0.01)
    assert made == []
    gate.set()
    assert eventually(lambda: made == ["last"]), "late is not never"
    assert eventually(lambda: running() == 0)


def test_closes_once_and_refuses_what_comes_later(one: DeadlineThreads) -> None:
    made: list[int] = []
    for n in range(3):
        one.close(lambda n=n: made.append(n), 10)
    assert made == [0]
    with pytest.raises(TierClosed, match=r"^tier one is closed$"):
        one.run(lambda: None, 10)


def test_an_error_of_the_last_call_is_told(one: DeadlineThreads) -> None:
    with pytest.raises(ZeroDivisionError):
        one.close(lambda: 1 // 0, 10)
    assert eventually(lambda: running() == 0)

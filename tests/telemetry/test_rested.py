"""Dear questions are asked seldom, cheap ones always."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from droidspeak.errors import TierUnavailable
from droidspeak.telemetry.rested import Rested


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("droidspeak.telemetry.rested.time", clock)
    return clock


def taking(clock: Clock, seconds: float, answer: int) -> Callable[[], int]:
    def ask() -> int:
        clock.now += seconds
        return answer

    return ask


def test_a_question_that_took_long_is_not_asked_again_soon(clock: Clock) -> None:
    rested = Rested[int]()
    assert rested.get(taking(clock, 2, 1)) == 1
    clock.now += 199
    assert rested.get(taking(clock, 2, 2)) == 1
    clock.now += 1
    assert rested.get(taking(clock, 2, 3)) == 3


def test_a_question_that_takes_no_time_is_always_asked(clock: Clock) -> None:
    rested = Rested[int]()
    assert [rested.get(taking(clock, 0, answer)) for answer in (1, 2)] == [1, 2]


def test_who_does_not_answer_has_no_answer_and_is_asked_again_later(clock: Clock) -> None:
    def fail() -> int:
        clock.now += 1
        raise TierUnavailable("gone")

    rested = Rested[int]()
    assert rested.get(taking(clock, 0, 1)) == 1
    assert rested.get(fail) is None
    assert rested.get(taking(clock, 0, 2)) is None
    clock.now += 100
    assert rested.get(taking(clock, 0, 2)) == 2


def test_one_asks_for_all_who_come_meanwhile() -> None:
    began, go_on = threading.Event(), threading.Event()
    rested, found = Rested[int](), []

    def ask() -> int:
        began.set()
        assert go_on.wait(60)
        return 1

    def other() -> int:
        raise AssertionError("it is being asked")

    first = threading.Thread(target=lambda: found.append(rested.get(ask)))
    first.start()
    assert began.wait(60)
    second = threading.Thread(target=lambda: found.append(rested.get(other)))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    go_on.set()
    first.join(60)
    second.join(60)
    assert found == [1, 1]

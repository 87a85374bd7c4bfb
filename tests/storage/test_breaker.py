"""The circuit breaker, on a clock that the test moves."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from droidspeak.storage.breaker import BreakerState, CircuitBreaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(threshold=1, cooldown=10, max_cooldown=40, clock=clock)


def closed_for(breaker: CircuitBreaker, clock: Clock) -> float:
    """Seconds until the next call is let through."""
    start = clock.now
    while not breaker.allow():
        clock.now += 1
    return clock.now - start


def test_opens_after_failures_in_a_row(clock: Clock) -> None:
    breaker = CircuitBreaker(threshold=3, cooldown=10, clock=clock)
    assert [breaker.fail(), breaker.fail()] == [False, False]
    breaker.succeed()
    assert [breaker.fail(), breaker.fail()] == [False, False]
    assert breaker.state is BreakerState.CLOSED
    assert breaker.allow()
    assert breaker.fail()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allow()


def test_lets_one_probe_through_after_the_cooldown(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.fail()
    assert closed_for(breaker, clock) == 10
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allow()
    assert breaker.succeed()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.allow()
    assert breaker.allow()
    assert not breaker.succeed()


def test_every_failed_probe_doubles_the_cooldown_up_to_the_longest(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    assert breaker.fail()
    waits = []
    for _ in range(4):
        waits.append(closed_for(breaker, clock))
        assert not breaker.fail()
    assert waits == [10, 20, 40, 40]


def test_a_tier_that_fails_again_at_once_has_not_come_back(breaker: CircuitBreaker, clock: Clock) -> None:
    waits = []
    for _ in range(3):
        assert breaker.fail()
        waits.append(closed_for(breaker, clock))
        breaker.succeed()
    assert waits == [10, 20, 40]
    clock.now += 41
    assert breaker.fail()
    assert closed_for(breaker, clock) == 10


def test_a_late_failure_of_an_older_call_does_not_double(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.fail()
    clock.now += 3
    assert not breaker.fail()
    assert closed_for(breaker, clock) == 10


def test_a_probe_that_never_reports_is_replaced(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.fail()
    closed_for(breaker, clock)
    assert closed_for(breaker, clock) == 10
    breaker.succeed()
    assert breaker.state is BreakerState.CLOSED


def test_one_probe_among_many_threads(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.fail()
    clock.now += 10
    together = Barrier(16)

    def ask(_: int) -> bool:
        together.wait()
        return breaker.allow()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(ask, range(16))) == 1
    finally:
        sys.setswitchinterval(interval)

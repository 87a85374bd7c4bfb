"""Single flight: one fetch, copies for those who joined, and nobody joins what has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from droidspeak.errors import TierTimeout
from droidspeak.storage.singleflight import SingleFlight

from .gates import eventually


class Fetch:
    """A fetch that waits for the test."""

    def __init__(self, answer: Callable[[], list[int]]) -> None:
        self.answer, self.count = answer, 0
        self.gate, self.entered = threading.Event(), threading.Event()

    def __call__(self) -> list[int]:
        self.count += 1
        self.entered.set()
        self.gate.wait(30)
        return self.answer()


@pytest.fixture
def flights() -> SingleFlight[list[int]]:
    return SingleFlight(list.copy)


def board(
    pool: ThreadPoolExecutor, flights: SingleFlight[list[int]], fetch: Fetch, count: int
) -> list[Future[tuple[list[int], bool]]]:
    """`count` callers, the first of them fetching and all others waiting for it."""
    calls = [pool.submit(flights.fetch, "key", "part", fetch)]
    assert fetch.entered.wait(10)
    calls += [pool.submit(flights.fetch, "key", "part", fetch) for _ in range(count - 1)]
    assert eventually(lambda: flights._flights["key", "part"].joined == count - 1)
    return calls


def test_many_callers_make_one_fetch(flights: SingleFlight[list[int]]) -> None:
    fetch = Fetch(lambda: [1, 2])
    with ThreadPoolExecutor(8) as pool:
        calls = board(pool, flights, fetch, 8)
        fetch.gate.set()
        answers = [call.result(10) for call in calls]
    assert fetch.count == 1
    assert [value for value, _ in answers] == [[1, 2]] * 8
    assert sum(shared for _, shared in answers) == 7
    assert not answers[0][1]


def test_the_first_caller_may_change_its_value(flights: SingleFlight[list[int]]) -> None:
    fetch = Fetch(lambda: [1, 2])
    with ThreadPoolExecutor(3) as pool:
        calls = board(pool, flights, fetch, 3)
        fetch.gate.set()
        calls[0].result(10)[0].clear()
        assert [call.result(10)[0] for call in calls[1:]] == [[1, 2]] * 2


def test_nothing_is_copied_for_nobody() -> None:
    flights: SingleFlight[list[int]] = SingleFlight(lambda _value: pytest.fail("copied"))
    value = [1]
    assert flights.fetch("key", None, lambda: value) == (value, False)
    assert flights.fetch("key", None, lambda: value)[0] is value


def test_a_failure_is_everybodys(flights: SingleFlight[list[int]]) -> None:
    def answer() -> list[int]:
        raise TierTimeout("late")

    fetch = Fetch(answer)
    with ThreadPoolExecutor(4) as pool:
        calls = board(pool, flights, fetch, 4)
        fetch.gate.set()
        for call in calls:
            with pytest.raises(TierTimeout):
                call.result(10)
    assert fetch.count == 1
    assert flights.fetch("key", "part", lambda: [3]) == ([3], False)


def test_an_interrupt_is_the_first_callers_own(flights: SingleFlight[list[int]]) -> None:
    answers = iter([KeyboardInterrupt(), [5]])

    def answer() -> list[int]:
        value = next(answers)
        if isinstance(value, BaseException):
            raise value
        return value

    fetch = Fetch(answer)
    with ThreadPoolExecutor(3) as pool:
        calls = board(pool, flights, fetch, 2)
        fetch.gate.set()
        assert calls[1].result(10) == ([5], False)
        with pytest.raises(KeyboardInterrupt):
            calls[0].result(10)


def test_other_keys_and_parts_fly_alone(flights: SingleFlight[list[int]]) -> None:
    fetch = Fetch(lambda: [1])
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(flights.fetch, "key", "part", fetch)
        assert fetch.entered.wait(10)
        assert flights.fetch("key", "other", lambda: [2]) == ([2], False)
        assert flights.fetch("other", "part", lambda: [3]) == ([3], False)
        fetch.gate.set()
        assert first.result(10) == ([1], False)
    assert not flights._flights


def test_nobody_joins_a_fetch_from_before_a_change(flights: SingleFlight[list[int]]) -> None:
    old = Fetch(lambda: [1])
    new = Fetch(lambda: [2])
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(flights.fetch, "key", "part", old)
        assert old.entered.wait(10)
        flights.forget("key")
        second = pool.submit(flights.fetch, "key", "part", new)
        assert new.entered.wait(10)
        old.gate.set()
        assert first.result(10) == ([1], False)
        # The old fetch has landed; the new one can still be joined.
        third = pool.submit(flights.fetch, "key", "part", lambda: [3])
        flight = flights._flights["key", "part"]
        assert eventually(lambda: flight.joined)
        new.gate.set()
        assert second.result(10) == ([2], False)
        assert third.result(10) == ([2], True)

"""The backlog: order, room, looking up, waiting, ending."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from droidspeak.errors import TierTimeout
from droidspeak.storage.backlog import Backlog
from droidspeak.storage.testing import make_key

from .gates import eventually

K = [make_key(n) for n in range(6)]


class Work:
    """Work that goes on only when the test lets it; `step()` lets one item through."""

    def __init__(self, capacity: int = 100) -> None:
        self.done: list[object] = []
        self.started: list[object] = []
        self.permits = threading.Semaphore(0)
        self.backlog: Backlog[object] = Backlog(self, capacity, "droidspeak test")

    def __call__(self, item: object) -> None:
        self.started.append(item)
        self.permits.acquire(timeout=30)
        if isinstance(item, BaseException):
            raise item
        self.done.append(item)

    def add(self, n: int, item: object, nbytes: int = 10, timeout: float = 0) -> bool:
        return self.backlog.add(K[n], item, nbytes, timeout)

    def begin(self, n: int, item: object, nbytes: int = 10) -> None:
        assert self.add(n, item, nbytes)
        assert eventually(lambda: item in self.started)

    def step(self, count: int = 1) -> None:
        self.permits.release(count)


@pytest.fixture
def work() -> Work:
    return Work()


def test_works_in_the_order_in_which_items_came(work: Work) -> None:
    for n in range(5):
        assert work.add(n, n)
    work.step(5)
    assert work.backlog.flush(10)
    assert work.done == [0, 1, 2, 3, 4]
    assert work.backlog.nbytes == 0
    assert work.backlog.keys() == []


def test_a_newer_item_takes_the_place_of_the_one_that_waits(work: Work) -> None:
    work.begin(0, "first")
    for n, item in enumerate(("old", "other", "new")):
        assert work.add(1 + n % 2, item, nbytes=20 + n)
    assert work.backlog.nbytes == 10 + 22 + 21
    assert work.backlog.get(K[1]) == "new"
    work.step(3)
    assert work.backlog.flush(10)
    assert work.done == ["first", "new", "other"]


def test_an_item_of_the_key_under_way_waits_behind_it(work: Work) -> None:
    work.begin(0, "old")
    assert work.backlog.get(K[0]) == "old"
    assert work.add(0, "new")
    assert work.backlog.get(K[0]) == "new"
    assert work.backlog.keys() == [K[0]]
    work.step(2)
    assert work.backlog.flush(10)
    assert work.done == ["old", "new"]


def test_what_waits_and_what_is_under_way_can_be_looked_up(work: Work) -> None:
    assert work.backlog.among(K) == {}
    work.begin(0, "zero")
    work.add(1, "one")
    assert work.backlog.among([K[2], K[1], K[0]]) == {K[0]: "zero", K[1]: "one"}
    assert work.backlog.keys() == [K[0], K[1]]
    work.step(2)
    assert work.backlog.flush(10)
    assert work.backlog.among(K) == {}


def test_is_bounded_in_bytes_and_gives_up_at_the_timeout(work: Work) -> None:
    work.begin(0, "a", nbytes=60)
    assert work.add(1, "b", nbytes=40)
    start = time.monotonic()
    assert not work.add(2, "c", nbytes=1, timeout=0.1)
    assert 0.1 <= time.monotonic() - start < 5
    assert work.backlog.nbytes == 100
    assert work.add(1, "B", nbytes=40), "a replacement needs no more room than it has"
    assert not work.add(1, "B+", nbytes=41)
    work.step(2)
    assert work.backlog.flush(10)
    assert work.done == ["a", "B"]


def test_waits_for_room(work: Work) -> None:
    work.begin(0, "a", nbytes=100)
    with ThreadPoolExecutor(1) as pool:
        added = pool.submit(work.add, 1, "b", 100, 30)
        assert not added.done()
        work.step()
        assert added.result(10)
    work.step()
    assert work.backlog.flush(10)


def test_dropping_what_waits_makes_room(work: Work) -> None:
    work.begin(0, "a", nbytes=50)
    work.add(1, "b", nbytes=50)
    with ThreadPoolExecutor(1) as pool:
        added = pool.submit(work.add, 2, "c", 50, 30)
        assert work.backlog.cancel(K[1], 0)
        assert added.result(10)
    work.step(2)
    assert work.backlog.flush(10)
    assert work.done == ["a", "c"]


def test_one_item_is_accepted_however_large(work: Work) -> None:
    work.begin(0, "huge", nbytes=1000)
    assert not work.add(1, "more", nbytes=1)
    work.step()
    assert work.backlog.flush(10)
    assert work.done == ["huge"]


def test_cancel_drops_what_waits_and_outwaits_what_is_under_way(work: Work) -> None:
    work.begin(0, "a")
    work.add(0, "a again")
    assert not work.backlog.cancel(K[1], 0)
    with ThreadPoolExecutor(1) as pool:
        cancelled = pool.submit(work.backlog.cancel, K[0], 30)
        assert eventually(lambda: work.backlog.get(K[0]) == "a")
        assert not cancelled.done()
        work.step()
        assert cancelled.result(10)
    assert work.done == ["a"]
    assert work.backlog.nbytes == 0


def test_cancel_says_when_it_is_still_under_way(work: Work) -> None:
    work.begin(0, "a")
    with pytest.raises(TierTimeout, match="under way"):
        work.backlog.cancel(K[0], 0.05)
    work.step()
    assert work.backlog.flush(10)


def test_settle_waits_for_its_key_only(work: Work) -> None:
    work.begin(0, "a")
    work.add(1, "b")
    assert work.backlog.settle(K[2], 0)
    assert not work.backlog.settle(K[0], 0.05)
    work.step()
    assert work.backlog.settle(K[0], 10)
    assert not work.backlog.settle(K[1], 0.05)
    work.step()
    assert work.backlog.settle(K[1], 10)


def test_flush_does_not_wait_for_what_comes_after_it(work: Work) -> None:
    work.begin(0, "a")
    work.add(1, "b")
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(work.backlog.flush, 30)
        assert not work.backlog.flush(0.05)
        work.add(2, "c")
        work.step(2)
        assert flushed.result(10)
    assert work.done == ["a", "b"]
    work.step()
    assert work.backlog.flush(10)


def test_flush_covers_what_has_been_replaced_since(work: Work) -> None:
    work.begin(0, "a")
    work.add(1, "old")
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(work.backlog.flush, 30)
        assert not work.backlog.flush(0.05)
        work.add(2, "later")
        work.add(1, "new")
        work.step()
        assert eventually(lambda: "new" in work.started)
        assert not work.backlog.flush(0.05)
        assert not flushed.done()
        work.step()
        assert flushed.result(10)
    assert work.done == ["a", "new"]
    work.step()
    assert work.backlog.flush(10)


def test_close_does_what_came_and_takes_nothing_more(work: Work) -> None:
    work.begin(0, "a")
    work.add(1, "b")
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(work.backlog.close, 30)
        assert eventually(lambda: not work.add(2, "c"))
        work.step(3)
        assert closed.result(10)
    assert work.done == ["a", "b"]
    assert work.backlog.close(0)


def test_close_wakes_those_who_wait_for_room(work: Work) -> None:
    work.begin(0, "a", nbytes=100)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(work.add, 1, "b", 100, 30)
        closed = pool.submit(work.backlog.close, 30)
        assert not waiting.result(10)
        assert not closed.done()
        work.step()
        assert closed.result(10)


def test_close_drops_what_it_cannot_wait_for(work: Work) -> None:
    work.begin(0, "a")
    work.add(1, "b", nbytes=90)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(work.add, 2, "c", 90, 30)
        assert not work.backlog.close(0.1)
        assert not waiting.result(10), "closing wakes those who wait for room"
    assert work.backlog.keys() == [K[0]]
    work.step()
    assert eventually(lambda: work.backlog.nbytes == 0)
    assert work.done == ["a"]


def test_an_idle_backlog_has_no_thread_and_holds_nothing(work: Work) -> None:
    class Item:
        pass

    item = Item()
    held = weakref.ref(item)
    for _ in range(3):
        work.add(0, item)
        work.step()
        assert work.backlog.flush(10)
        work.done.clear()
        work.started.clear()
        assert eventually(lambda: not any(t.name == "droidspeak test" for t in threading.enumerate()))
    del item
    gc.collect()
    assert held() is None


def test_a_bug_in_one_item_is_told_and_does_not_stop_the_others(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))
    bug = RuntimeError("bug")
    work.add(0, bug)
    work.add(1, "next")
    work.step(2)
    assert work.backlog.flush(10)
    assert eventually(lambda: told == [bug])
    assert work.done == ["next"]
    work.add(2, "last")
    work.step()
    assert work.backlog.flush(10)
    assert work.done == ["next", "last"]


def test_many_threads_lose_nothing() -> None:
    seen: list[tuple[int, int]] = []
    backlog: Backlog[tuple[int, int]] = Backlog(seen.append, 50, "droidspeak test")
    latest = {}

    def add(worker: int) -> None:
        for n in range(200):
            assert backlog.add(K[worker], (worker, n), 10, 30)
            latest[worker] = n

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(add, worker) for worker in range(6)]:
            done.result(30)
    assert backlog.flush(10)
    assert backlog.nbytes == 0
    for worker in range(6):
        mine = [n for who, n in seen if who == worker]
        assert mine == sorted(mine)
        assert mine[-1] == latest[worker] == 199

from __future__ import annotations

import threading

import pytest

from droidspeak.integrations.server.budget import BytesBudget, OverBudget

from .wireclient import wait_until


def test_gives_what_there_is_and_no_more():
    budget = BytesBudget(100)
    budget.take(60, 0.0)
    budget.take(40, 0.0)
    assert budget.held == 100
    with pytest.raises(OverBudget):
        budget.take(1, 0.01)
    assert budget.held == 100
    budget.give_back(60)
    budget.take(60, 0.0)


def test_what_can_never_be_had_is_refused_at_once():
    with pytest.raises(OverBudget):
        BytesBudget(100).take(101, 60.0)


def test_who_waits_longest_is_next_and_small_ones_do_not_slip_by():
    budget, order = BytesBudget(100), []
    budget.take(100, 0.0)

    def want(nbytes: int) -> None:
        budget.take(nbytes, 60.0)
        order.append(nbytes)
        budget.give_back(nbytes)

    threads = []
    for nbytes in (90, 1, 80):
        threads.append(threading.Thread(target=want, args=(nbytes,)))
        threads[-1].start()
        wait_until(lambda: len(budget._queue) == len(threads), "the queue")
    budget.give_back(50)
    # 50 are free, and the one who wants 1 still waits behind the one who wants 90.
    with pytest.raises(OverBudget):
        budget.take(1, 0.05)
    assert order == []
    budget.give_back(50)
    for thread in threads:
        thread.join()
    assert order == [90, 1, 80]
    assert budget.held == 0


def test_one_who_gives_up_lets_the_next_go_on():
    budget = BytesBudget(100)
    budget.take(50, 0.0)
    with pytest.raises(OverBudget):
        budget.take(80, 0.01)
    budget.take(50, 0.0)

"""The benchmark of the daemon: what it says about targets, and how much it measures."""

from __future__ import annotations

import pytest

from benchmarks.measure import Series
from benchmarks.server.throughput import MIB, Case, Plan, objects
from benchmarks.server.verdicts import judged, least, size_text


def _found(*ratios: float) -> dict[Case, dict[str, Series]]:
    return {
        Case("get", 1, MIB << step): {"ours": Series((1.0, 1.0)), "stock": Series((ratio, ratio))}
        for step, ratio in enumerate(ratios)
    }


def test_a_target_is_missed_if_any_case_misses_it() -> None:
    target, measured, met = least("GET", 1.3, _found(2.0, 1.2, 1.4), "stock")

    assert (target, met) == ("GET", "**no**")
    assert measured == "least 1.20 (get, 2 MiB, connections 1), median 1.40; met in 2 of 3 cases"


def test_a_target_is_met_at_its_limit() -> None:
    assert least("GET", 1.3, _found(1.3, 1.5), "stock")[-1] == "yes"


def test_only_the_operation_asked_for_counts() -> None:
    found = _found(2.0) | {Case("put", 1, MIB): {"ours": Series((4.0,)), "stock": Series((1.0,))}}

    assert least("GET", 1.3, found, "stock", "get") == least("GET", 1.3, _found(2.0), "stock")
    assert least("all", 1.3, found, "stock")[-1] == "**no**"


def test_every_connection_has_two_values_at_least_and_slow_servers_fewer() -> None:
    plan = Plan(sizes=(), connections=(), volume=64 * MIB, acknowledged={"stock": 8})

    assert objects(plan, Case("put", 8, 16 * MIB), "stock") == 2
    assert objects(plan, Case("put_ack", 1, MIB), "stock") == 8
    assert objects(plan, Case("put_ack", 1, MIB), "ours") == objects(plan, Case("put", 1, MIB), "stock") == 64


@pytest.mark.parametrize(("nbytes", "text"), [(MIB // 4, "256 KiB"), (MIB, "1 MiB"), (16 * MIB, "16 MiB")])
def test_sizes_as_text(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_a_missed_target_stands_out() -> None:
    assert judged("t", "m", False) == ["t", "m", "**no**"]

"""Targets, and whether what was measured meets them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.measure import Series
from benchmarks.server.throughput import MIB, Case

__all__ = ["judged", "least", "size_text"]


def judged(target: str, measured: str, met: bool) -> list[str]:
    """A row of the table of targets."""
    return [target, measured, "yes" if met else "**no**"]


def least(
    target: str,
    limit: float,
    found: Mapping[Case, Mapping[str, Series]],
    other: str,
    operation: str | None = None,
) -> list[str]:
    """The row for `ours` being at least `limit` times as fast as `other` in each case that was `found`.

    Args:
        operation: the only one that counts; all do by default.
    """
    ratios = {
        case: series["ours"].ratio(series[other])
        for case, series in found.items()
        if operation in (None, case.operation)
    }
    worst = min(ratios, key=lambda case: ratios[case])
    met = sum(ratio >= limit for ratio in ratios.values())
    where = f"{worst.operation}, {size_text(worst.size)}, connections {worst.connections}"
    figure = f"least {ratios[worst]:.2f} ({where}), median {statistics.median(ratios.values()):.2f}"
    return judged(target, f"{figure}; met in {met} of {len(ratios)} cases", met == len(ratios))


def size_text(nbytes: int) -> str:
    """Bytes as `256 KiB` or `4 MiB`."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes >> 10} KiB"

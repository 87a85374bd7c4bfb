"""Measures the daemon and writes `docs/benchmarks/server.md`; `--quick` prints a short run instead."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks.measure import Series, machine, table
from benchmarks.server.limits import idle_connections, resident_memory
from benchmarks.server.processes import ours, plain, redis, stock
from benchmarks.server.spilled import spilled
from benchmarks.server.throughput import MIB, Case, Plan, measure
from benchmarks.server.verdicts import judged, least, size_text

_REPORT = Path(__file__).parents[2] / "docs" / "benchmarks" / "server.md"
_SERVERS = ("raw", "redis", "stock", "ours")
_KIB = 1 << 10
_FULL = Plan(
    sizes=(256 * _KIB, MIB, 4 * MIB, 16 * MIB),
    connections=(1, 4, 8),
    volume=64 * MIB,
    acknowledged={"stock": 8},
)
_QUICK = Plan(
    sizes=(256 * _KIB, 4 * MIB), connections=(1,), rounds=3, volume=32 * MIB, acknowledged={"stock": 6}
)
_GIB = 1 << 30
_HOW = """Server and clients share the machine. Servers take turns in random order within each round; figures
are medians with minimum and maximum, ratios medians of the rounds' ratios."""
_WHAT = """`put`: streamed, one EXIST at the end. `put_ack`: an EXIST after each (Redis acknowledges all).
`raw` moves the same bytes and keeps nothing. Clients behave on the wire as LMCache's own."""

_DISK = """One connection, page cache warm, checksums verified. Promotion to memory is off, so that each GET
is one of the disk."""


def main(quick: bool) -> None:
    """Runs everything, one after the other."""
    plan, load = _QUICK if quick else _FULL, os.getloadavg()[0]
    sections: list[str] = []
    verdicts: list[list[str]] = []
    for part in (_throughput, _through_lmcache, _memory, _connections, _from_disk):
        section, told = part(plan, quick)
        print(f"{section}\n\n{_targets(told)}\n", flush=True)
        sections.append(section)
        verdicts += told
    if not quick:
        today = datetime.datetime.now(tz=datetime.UTC).date()
        head = f"# The daemon\n\nMade by `make bench-server` on {today}: {machine()}.\n{_HOW}\n"
        head += f"Load average of the machine before: {load:.1f}.\n\n## Targets\n"
        _REPORT.write_text("\n".join([head, _targets(verdicts) + "\n", *(part + "\n" for part in sections)]))


def _targets(rows: list[list[str]]) -> str:
    return table(["target", "measured", "met"], rows)


def _throughput(plan: Plan, quick: bool) -> tuple[str, list[list[str]]]:  # noqa: ARG001
    with ExitStack() as undo:
        servers = [
            undo.enter_context(started)
            for started in (plain(), redis(), stock(), ours("cpu://?capacity=4GiB"))
        ]
        found = measure(plan, {server.name: server.port for server in servers}, _progress)
    columns = ["", "connections", "object", *_SERVERS, "ours, min-max", "/ stock", "/ redis", "/ raw"]
    rows = [_row(case, series) for case, series in found.items()]
    text = f"## Throughput over loopback, MB/s\n\n{_WHAT}\n\n{table(columns, rows)}"
    return text, _throughput_verdicts(found)


def _row(case: Case, series: Mapping[str, Series]) -> list[str]:
    ours_s = series["ours"].seconds
    return [
        case.operation,
        str(case.connections),
        size_text(case.size),
        *(_rate(case, series[name].median) for name in _SERVERS),
        f"{_rate(case, max(ours_s))}-{_rate(case, min(ours_s))}",
        *(f"{series['ours'].ratio(series[name]):.2f}" for name in ("stock", "redis", "raw")),
    ]


def _rate(case: Case, seconds: float) -> str:
    return f"{case.size / seconds / 1e6:,.0f}"


def _progress(case: Case, series: Mapping[str, Series]) -> None:
    cells = "  ".join(f"{name} {case.size / one.median / 1e6:,.0f}" for name, one in series.items())
    print(
        f"{case.operation} x{case.connections} {size_text(case.size)}: {cells} MB/s",
        file=sys.stderr,
        flush=True,
    )


def _throughput_verdicts(found: Mapping[Case, Mapping[str, Series]]) -> list[list[str]]:
    alone = {case: series for case, series in found.items() if case.connections == 1 and case.size <= 4 * MIB}
    large = {case: series for case, series in found.items() if case.size >= MIB}
    return [
        least("acknowledged PUT >= 5 x stock, one connection, to 4 MiB", 5, alone, "stock", "put_ack"),
        least("streamed PUT >= 1.2 x stock", 1.2, found, "stock", "put"),
        least("GET >= 1.3 x stock", 1.3, found, "stock", "get"),
        least("everything > Redis", 1, found, "redis"),
        least(">= 0.7 x raw loopback, from 1 MiB on", 0.7, large, "raw"),
    ]


def _through_lmcache(plan: Plan, quick: bool) -> tuple[str, list[list[str]]]:  # noqa: ARG001
    with stock() as theirs, ours("cpu://?capacity=2GiB") as mine:
        command = [sys.executable, "-m", "benchmarks.server.lmcacheclient", "2" if quick else "7"]
        words = [f"{server.name}={server.port}" for server in (theirs, mine)]
        found = json.loads(
            subprocess.run([*command, *words], capture_output=True, check=True, text=True).stdout
        )
    rows = []
    for what, mine_s in found["ours"].items():
        operation, _, size = what.rpartition(" ")
        theirs_s = found["stock"][what]
        rows.append(
            [
                operation,
                size_text(int(size)),
                _tail(theirs_s),
                _tail(mine_s),
                f"{_p50(theirs_s) / _p50(mine_s):.2f}",
            ]
        )
    big = f"put + exists {4 * MIB}"
    ratio = _p50(found["stock"][big]) / _p50(found["ours"][big])
    text = "## Through LMCache's own connector, ms: p50 (p90)\n\n" + table(
        ["", "object", "stock", "ours", "ratio of p50"], rows
    )
    target = "LMCache's connector: put + exists of 4 MiB >= 4 x faster (p50)"
    return text, [judged(target, f"{ratio:.2f}", ratio >= 4)]


def _memory(plan: Plan, quick: bool) -> tuple[str, list[list[str]]]:  # noqa: ARG001
    text, shares = resident_memory((_GIB,) if quick else (_GIB, 4 * _GIB))
    told = "## Memory while 5 x the capacity is written\n\n" + text
    return told, [
        judged(f"{what} <= capacity + 15 %", f"{share:.2f} x capacity at worst", share <= 1.15)
        for what, share in shares.items()
    ]


def _connections(plan: Plan, quick: bool) -> tuple[str, list[list[str]]]:  # noqa: ARG001
    text, nbytes = idle_connections(1000, 500)
    told = judged("1,000 idle connections < 100 MiB", f"{nbytes / MIB:.0f} MiB", nbytes < 100 * MIB)
    return "## Connections that do nothing\n\n" + text, [told]


def _from_disk(plan: Plan, quick: bool) -> tuple[str, list[list[str]]]:
    text, ratios = spilled((4 * MIB,) if quick else (MIB, 4 * MIB, 16 * MIB), plan.rounds)
    figure = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    told = f"## GET of what lies on disk\n\n{_DISK}\n\n{text}"
    return told, [judged("GET from disk >= 0.6 x pread + send", figure, min(ratios) >= 0.6)]


def _p50(seconds: list[float]) -> float:
    return statistics.median(seconds)


def _tail(seconds: list[float]) -> str:
    return f"{_p50(seconds) * 1e3:.2f} ({statistics.quantiles(seconds, n=10)[-1] * 1e3:.2f})"


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])

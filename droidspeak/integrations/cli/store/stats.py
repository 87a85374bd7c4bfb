"""`droidspeak store stats`: how well the store serves, once or again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol, runtime_checkable

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from droidspeak.connector.reports import Sums, counts_of
from droidspeak.errors import DroidSpeakError, StorageError
from droidspeak.integrations.cli.output import Format, FormatOption, show_document, show_json
from droidspeak.integrations.cli.store.rates import Rates
from droidspeak.integrations.cli.store.reported import fail, reports_in
from droidspeak.integrations.cli.store.showing import share_text, size_text
from droidspeak.integrations.cli.store.target import ConfigOption, StoreOption, Target, open_target
from droidspeak.storage.reports import TOTAL

__all__ = ["stats"]


@runtime_checkable
class _Counting(Protocol):
    """A tier with a daemon behind it, which counts for itself."""

    def daemon_counters(self) -> dict[str, dict[str, int]]: ...


def stats(
    watch: Annotated[
        float | None,
        typer.Option(min=0.1, max=3600, metavar="SECONDS", help="Look again that often, until Ctrl-C."),
    ] = None,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show the hit rate, where bytes came from and how fast, evictions, and what is held."""
    with open_target(store, config, tolerant=True) as target:
        rates = Rates()
        if watch is None:
            document, failed = _look(target, rates)
            show_document(format, document, lambda: _console().print(_tables(document)))
            fail(failed)
        elif format is Format.TABLE:
            _watch(target, rates, watch)
        else:
            while True:
                _tell(_look(target, rates)[0], format)
                time.sleep(watch)


def _watch(target: Target, rates: Rates, seconds: float) -> None:
    console = _console()
    if not console.is_terminal:
        while True:
            console.print(_tables(_look(target, rates)[0]))
            time.sleep(seconds)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            live.update(_tables(_look(target, rates)[0]), refresh=True)
            time.sleep(seconds)


def _console() -> Console:
    console = Console()
    # A pipe has no width of its own; a folded table is of no use to grep.
    return console if console.is_terminal else Console(width=160)


def _tell(document: Mapping[str, Any], format: Format) -> None:
    if format is Format.JSON:
        show_json(document)
    elif format is Format.JSONL:
        print(json.dumps(document), flush=True)


# --- what is found ---


def _look(target: Target, rates: Rates) -> tuple[dict[str, Any], dict[str, DroidSpeakError]]:
    reports, failed = reports_in(target)
    counts = counts_of(reports)
    tiers: list[dict[str, Any]] = []
    daemons: dict[str, Any] = {}
    for name, tier in target.tiers.items():
        try:
            found = [_held(part, usage) for part, usage in tier.by_tier().items()]
            counted = tier.daemon_counters() if isinstance(tier, _Counting) else None
        except StorageError as error:
            failed.setdefault(name, error)
            continue
        tiers += found
        if counted:
            daemons[name] = counted
    tiers += [_held(name, None) for name in failed]
    document = {
        "version": 1,
        "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}Z",
        "engines": sum(1 for report in reports if report.engine != TOTAL and not report.ended),
        "processes": sum(report.processes for report in reports),
        **_figures(counts),
        "per_second": rates.of(reports),
        "tiers": tiers,
        "daemons": daemons,
    }
    return document, failed


def _figures(counts: Sums) -> dict[str, Any]:
    requests = _table(counts, "requests")
    asked = sum(requests.values())
    return {
        "hit_rate": round(requests.get("applied", 0) / asked, 6) if asked else None,
        "requests": requests,
        "reasons": _table(counts, "reasons"),
        "lookups": _table(counts, "lookups"),
        "tokens": {
            "own": _pairs(counts, "tokens", own=True),
            "shared": _pairs(counts, "tokens", own=False),
            "saved": _pairs(counts, "tokens_saved", own=True) + _pairs(counts, "tokens_saved", own=False),
        },
        "loads": [
            {
                "tier": tier,
                "bytes": int(counts["tier", tier, "bytes"]),
                "seconds": seconds,
                "bandwidth": counts["tier", tier, "bytes"] / seconds if seconds else None,
            }
            for (kind, tier, *rest), seconds in sorted(counts.items())
            if kind == "tier" and rest == ["seconds"]
        ],
        "events": {name: _table(counts, name, "event") for name in sorted(_names(counts, "event"))},
    }


def _names(counts: Sums, kind: str) -> set[str]:
    return {path[1] for path in counts if path[0] == kind}


def _table(counts: Sums, name: str, kind: str = "count") -> dict[str, int]:
    return {path[2]: int(value) for path, value in sorted(counts.items()) if path[:2] == (kind, name)}


def _pairs(counts: Sums, figure: str, *, own: bool) -> float:
    return sum(
        value
        for path, value in counts.items()
        if path[0] == "pair" and path[3] == figure and (path[1] == path[2]) is own
    )


def _held(name: str, usage: Any) -> dict[str, Any]:
    return {
        "tier": name,
        "answers": usage is not None,
        "chunks": usage.chunks if usage else None,
        "bytes": usage.nbytes if usage else None,
        "capacity": usage.capacity if usage else None,
    }


# --- how it is shown ---


def _tables(found: Mapping[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [_requests(found)]
    if found["reasons"]:
        parts.append(_grid("Reasons", ["reason", "requests", "share"], _reasons(found)))
    if found["loads"]:
        parts.append(_grid("Loads", ["tier", "loaded", "bandwidth", "now"], _loads(found)))
    parts.append(_grid("Tiers", ["tier", "chunks", "size", "used", "hits", "evictions"], _tiers(found)))
    return Group(*parts)


def _requests(found: Mapping[str, Any]) -> Table:
    asked, tokens, rates = sum(found["requests"].values()), found["tokens"], found["per_second"] or {}
    rate = "-" if found["hit_rate"] is None else f"{100 * found['hit_rate']:.1f} %"
    rows = [
        ["requests", f"{asked:,}", _rate(rates.get("requests"))],
        ["served from the store", rate, _rate(rates.get("applied"))],
        ["tokens from own caches", f"{tokens['own']:,.0f}", _rate(rates.get("tokens_own"))],
        ["tokens from other models' caches", f"{tokens['shared']:,.0f}", _rate(rates.get("tokens_shared"))],
        ["tokens of prefill saved", f"{tokens['saved']:,.0f}", _rate(rates.get("tokens_saved"))],
        ["engines running, processes so far", f"{found['engines']}, {found['processes']}", ""],
    ]
    return _grid(f"Requests, {found['at']}", ["", "so far", "a second"], rows)


def _reasons(found: Mapping[str, Any]) -> list[list[str]]:
    asked = sum(found["reasons"].values())
    ranked = sorted(found["reasons"].items(), key=lambda row: -row[1])
    return [[reason, f"{count:,}", share_text(count, asked)] for reason, count in ranked]


def _loads(found: Mapping[str, Any]) -> list[list[str]]:
    now = (found["per_second"] or {}).get("loads", {})
    return [
        [
            load["tier"],
            size_text(load["bytes"]),
            "-" if load["bandwidth"] is None else f"{size_text(int(load['bandwidth']))}/s",
            f"{size_text(int(now[load['tier']]))}/s" if load["tier"] in now else "-",
        ]
        for load in found["loads"]
    ]


def _tiers(found: Mapping[str, Any]) -> list[list[str]]:
    hits, evictions = found["events"].get("hits", {}), found["events"].get("evictions", {})
    held = {row["tier"]: row for row in found["tiers"]}
    rows = []
    # Memory ends with its process; what happened in it does not.
    for tier in [*held, *sorted({*hits, *evictions} - {*held, ""})]:
        row = held.get(tier)
        known = row is not None and row["answers"]
        rows.append(
            [
                tier,
                f"{row['chunks']:,}" if row and known else "-",
                size_text(row["bytes"]) if row and known else "-",
                share_text(row["bytes"], row["capacity"]) if row and known else "-",
                f"{hits.get(tier, 0):,}",
                f"{evictions.get(tier, 0):,}",
            ]
        )
    return rows


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _grid(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table

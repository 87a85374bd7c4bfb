"""What counting costs a lookup of 16 chunks on a warm disk tier; writes docs/benchmarks/metrics.md."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.measure import Series, interleaved, machine, table
from droidspeak.connector import Connector, Match, Outcome
from droidspeak.connector.tally import Tally
from droidspeak.layerselect import Costs, Plan, Policy, PolicySet
from droidspeak.storage import Architecture, SourceManifest, TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.telemetry.export import expose

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "metrics.md"
CHUNKS, SIZE, LAYERS = 16, 256, 4
TARGET = 0.01
_ARCHITECTURE = Architecture("llama", LAYERS, 1, 8, 8, 32_000, "rope", "full", "bfloat16")
_SENDER, _RECEIVER = (SourceManifest(name, _ARCHITECTURE, "ids:32000") for name in ("sender", "receiver"))
_IDS = [(7 * n) % 32_000 for n in range(CHUNKS * SIZE + 1)]
_CALLS, _ROUNDS = 100, 61


class _Silent(Tally):
    """Counts nothing."""

    def lookup(self, match: Match, seconds: float) -> None: ...

    def outcome(self, outcome: Outcome, receiver: str | None) -> None: ...


@contextmanager
def serving(folder: Path) -> Iterator[Connector]:
    """A connector over a store that holds the prompt, saved by the sender."""
    costs = Costs(per_token=1e-6, per_token_pair=1e-9, per_mapped_token=0.0, suffix=0.01)
    fixed = Policy.fixed(_SENDER.source_id, _RECEIVER.source_id, Plan.parse("2-3", LAYERS))
    policies = PolicySet([replace(fixed, costs=costs)])
    with TieredStore([DiskTier(folder, min_free=0)]) as store:
        connector = Connector(store, policies)
        save(connector)
        yield connector
        connector.close()


def save(connector: Connector) -> None:
    """Keeps the prompt as the sender would have prefilled it."""
    session = connector.save(_IDS, _SENDER)
    rows = torch.ones(len(_IDS), 1, 8, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        e = torch.ones(len(_IDS), 8, dtype=torch.bfloat16) if layer in session.e_layers else None
        session.put(layer, rows, rows, e)
    assert session.finish(wait=True) == CHUNKS
    connector.store.flush()  # type: ignore[attr-defined]


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """`call`, as often as makes the clock's own time not matter."""

    def calls() -> None:
        for _ in range(_CALLS):
            call()

    return calls


def one(series: Series) -> Series:
    """Seconds of a single call."""
    return Series(tuple(seconds / _CALLS for seconds in series.seconds))


def _nothing(*_arguments: object) -> None: ...


def lookups(connector: Connector) -> list[list[str]]:
    """Rows: exact and cross-model hits, and misses."""
    other = [(11 * n + 5) % 32_000 for n in range(len(_IDS))]
    cases = {
        "own chunks (exact hit)": (_IDS, _SENDER),
        "another model's chunks (cross-model hit)": (_IDS, _RECEIVER),
        "nothing there (miss)": (other, _SENDER),
    }
    return [_row(title, connector, ids, receiver) for title, (ids, receiver) in cases.items()]


def _row(title: str, connector: Connector, ids: list[int], receiver: SourceManifest) -> list[str]:
    # As engines have them: hashing a list is slower, and would make the share of counting look smaller.
    tokens = torch.tensor(ids)
    match = connector.lookup(tokens, receiver)
    tally, silent = connector._tally, _Silent(connector.counters, connector.policies)

    predicted, situation = connector._predicted, connector._situation(receiver, match.shared)

    def lookup(counting: Tally, predicting: Callable[..., float | None]) -> None:
        connector._tally, connector._predicted = counting, predicting  # type: ignore[method-assign]
        connector.lookup(tokens, receiver)

    def count() -> None:
        if match.policy and match.plan:
            predicted(match.policy, match.plan, situation, len(match.shared))
        tally.lookup(match, 0.001)

    calls: dict[str, Callable[[], object]] = {
        "without": lambda: lookup(silent, _nothing),
        "with": lambda: lookup(tally, predicted),
        "without again": lambda: lookup(silent, _nothing),
        "counting": count,
    }
    timed = interleaved({name: repeated(call) for name, call in calls.items()}, rounds=_ROUNDS)
    connector._tally, connector._predicted = tally, predicted  # type: ignore[method-assign]
    without, with_, again, alone = (one(timed[name]) for name in calls)
    share = alone.median / without.median
    return [
        title,
        without.spread(1e6),
        with_.spread(1e6),
        f"{without.ratio(with_) - 1:+.2%}",
        f"{without.ratio(again) - 1:+.2%}",
        alone.spread(1e6, 2),
        f"{share:.2%}",
        "yes" if share < TARGET else "**no**",
    ]


def others(connector: Connector) -> list[list[str]]:
    """Rows: counting an outcome, and a scrape."""
    match = connector.lookup(_IDS, _RECEIVER)
    outcome = Outcome(match.reason, len(_IDS), 0, match.shared_tokens, match.plan, match.source, 1, 0.1)
    registry = CollectorRegistry()
    expose(connector, registry)
    timed = interleaved({"record": repeated(lambda: connector.record(outcome, match))}, rounds=_ROUNDS)
    scraped = interleaved({"scrape": lambda: generate_latest(registry)}, rounds=_ROUNDS)
    return [
        ["an outcome, counted (`record`)", one(timed["record"]).spread(1e6, 1)],
        ["a scrape of all metrics", scraped["scrape"].spread(1e6, 0)],
    ]


def page(rows: list[list[str]], rest: list[list[str]], load: float) -> str:
    """The Markdown."""
    columns = [
        "lookup",
        "without, us",
        "with, us",
        "with / without",
        "without again / without",
        "counting alone, us",
        "share",
        "< 1 %",
    ]
    return f"""# What metrics cost

Made by `make bench-metrics` on {datetime.now(UTC):%Y-%m-%d}: {machine()}.
Load average of the machine before: {load:.1f}. Medians with minimum and maximum of {_ROUNDS} rounds of
{_CALLS} calls, taken in turn.

A lookup of {CHUNKS} chunks of {SIZE} tokens on a warm disk tier. *With / without* is the median over
rounds of two whole lookups' ratio, *without again* the same of two that are alike: that is the noise.
*Counting alone* is what the metrics do in one lookup (a count by result, its duration, and for a cross-model
hit the predicted time to first token), timed by itself; the share is that by the lookup without.

{table(columns, rows)}

| besides | us |
| --- | --- |
{chr(10).join(f"| {name} | {figure} |" for name, figure in rest)}
"""


def main() -> None:
    """Measures and writes the page."""
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as connector:
        gc.disable()
        started = time.perf_counter()
        text = page(lookups(connector), others(connector), load)
    PAGE.write_text(text)
    print(text)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

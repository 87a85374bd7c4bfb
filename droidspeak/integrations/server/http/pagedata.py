"""What the status page shows, gathered: tiers, models, sharing, policies, drift, engines.

What is dear to find out is asked for seldom (`droidspeak.telemetry.rested`); the page then shows what was
found before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from droidspeak.connector.reports import OTHER, Drift, Pair, Report, counts_of, pairs_of, read_reports
from droidspeak.errors import PolicyError, StorageError
from droidspeak.integrations.server.http.auth import Access
from droidspeak.integrations.server.state import DEFAULT_TENANT, DaemonState
from droidspeak.layerselect.artifact import Artifact, read_artifact
from droidspeak.storage import Tier, TierUsage
from droidspeak.storage.reports import TOTAL
from droidspeak.telemetry.rested import Rested

__all__ = ["Content", "Engine", "Matrix", "Model", "PageSource", "Policies", "TierRow"]

_LATELY = timedelta(minutes=10)
_MOST_MODELS = 12


@dataclass(frozen=True)
class TierRow:
    """One tier; `usage` is `None` while it does not answer."""

    name: str
    usage: TierUsage | None
    hits: int
    corrupt: int
    evicted: int

    @property
    def filled(self) -> float | None:
        """Share of the capacity, 0 .. 1."""
        if self.usage is None or not self.usage.capacity:
            return None
        return min(1.0, self.usage.nbytes / self.usage.capacity)


@dataclass(frozen=True)
class Model:
    """A source model and what is held of it, in each tier together."""

    id: str
    name: str
    chunks: int
    nbytes: int
    tiers: Sequence[str]


@dataclass(frozen=True)
class Matrix:
    """Sharing: rows are senders, columns receivers.

    Attributes:
        cells: by sender and receiver.
        left_out: models that there was no room for.
    """

    senders: Sequence[str]
    receivers: Sequence[str]
    cells: Mapping[tuple[str, str], Pair]
    left_out: int

    @property
    def most(self) -> float:
        """Saved tokens of the pair of two models that saved most."""
        return max(
            (pair.tokens_saved for pair in self.cells.values() if pair.sender != pair.receiver), default=0
        )


@dataclass(frozen=True)
class Policies:
    """Policy files of the configured folder; `fault` where it cannot be read."""

    found: Sequence[Artifact]
    refused: Sequence[str]
    fault: str | None = None


@dataclass(frozen=True)
class Engine:
    """A process that has told of itself."""

    report: Report
    age: timedelta
    requests: int
    applied: int

    @property
    def alive(self) -> bool:
        """As far as can be told: it has not ended, and was heard of lately."""
        return not self.report.ended and self.age < _LATELY


@dataclass(frozen=True)
class Content:
    """Everything on the page."""

    tenant: str
    ready: bool
    now: datetime
    tiers: Sequence[TierRow]
    models: Sequence[Model]
    pairs: Sequence[Pair]
    matrix: Matrix
    policies: Policies | None
    drift: Sequence[Drift]
    engines: Sequence[Engine]
    requests: int
    applied: int
    reports_fault: str | None
    names: Mapping[str, str]

    def name(self, source: str) -> str:
        """What a model is called: by its policies, or the beginning of its source id."""
        return self.names.get(source, source if source == OTHER else source[:12])

    def drift_of(self, sender: str, receiver: str) -> Drift | None:
        """The latest state of a pair."""
        return next((one for one in self.drift if (one.sender, one.receiver) == (sender, receiver)), None)

    @property
    def shared_tokens_saved(self) -> float:
        """Of prefill, by other models' caches."""
        return sum(pair.tokens_saved for pair in self.pairs if pair.sender != pair.receiver)

    @property
    def own_tokens(self) -> int:
        """That came from the models' own caches."""
        return sum(pair.tokens for pair in self.pairs if pair.sender == pair.receiver)


class PageSource:
    """Gathers for `daemon`, whose stores are looked up at each request."""

    def __init__(self, daemon: DaemonState) -> None:
        self._daemon = daemon
        self._usages: dict[tuple[str, str], Rested[TierUsage]] = {}
        self._sources: dict[tuple[str, str], Rested[Mapping[Any, TierUsage]]] = {}
        self._artifacts = _Artifacts()

    def content(self, access: Access) -> Content:
        """What the caller may see: the tenant's own; policies and their names are the default tenant's."""
        store, now = access.store, datetime.now(UTC)
        reports, fault = _reports(store)
        folder = self._daemon.settings.policies if access.tenant == DEFAULT_TENANT else None
        policies = self._artifacts.read(folder) if folder else None
        names = _names(policies.found if policies else ())
        pairs = pairs_of(reports)
        counts = counts_of(reports)
        return Content(
            tenant=access.tenant,
            ready=self._daemon.ready.is_set(),
            now=now,
            tiers=[self._tier(access, tier) for tier in store.tiers],
            models=self._models(access, names),
            pairs=pairs,
            matrix=_matrix(pairs),
            policies=policies,
            drift=_drift(reports),
            engines=_engines(reports, now),
            requests=int(_sum(counts, "requests")),
            applied=int(counts.get(("count", "requests", "applied"), 0)),
            reports_fault=fault,
            names=names,
        )

    def _tier(self, access: Access, tier: Tier) -> TierRow:
        counters = access.store.counters
        usage = self._usages.setdefault((access.tenant, tier.name), Rested()).get(tier.usage)
        return TierRow(
            tier.name,
            usage,
            counters.get("hits", tier.name),
            counters.get("corrupt", tier.name),
            tier.evicted().chunks,
        )

    def _models(self, access: Access, names: Mapping[str, str]) -> list[Model]:
        held: dict[str, list[tuple[str, TierUsage]]] = {}
        for tier in access.store.tiers:
            asked = self._sources.setdefault((access.tenant, tier.name), Rested())
            for source, usage in (asked.get(tier.sources) or {}).items():
                held.setdefault(source, []).append((tier.name, usage))
        models = (
            Model(
                source,
                names.get(source, source[:12]),
                max(usage.chunks for _, usage in parts),
                sum(usage.nbytes for _, usage in parts),
                [tier for tier, _ in parts],
            )
            for source, parts in held.items()
        )
        return sorted(models, key=lambda model: (-model.nbytes, model.id))


class _Artifacts:
    """The files of a folder, each read again when it has changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[tuple[int, int], Artifact | str]] = {}

    def read(self, folder: Path) -> Policies:
        with self._lock:
            try:
                paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
                found = [self._one(path) for path in paths if not path.name.startswith(".")]
            except OSError as error:
                return Policies((), (), f"{folder}: {error.strerror}")
        artifacts = [one for one in found if isinstance(one, Artifact)]
        # Of two of one pair the later made counts, as for the engines.
        latest = {(one.sender.source_id, one.receiver.source_id): one for one in sorted(artifacts, key=_made)}
        return Policies(
            sorted(latest.values(), key=lambda one: (one.receiver.name, one.sender.name)),
            [one for one in found if isinstance(one, str)],
        )

    def _one(self, path: Path) -> Artifact | str:
        status = path.stat()
        version = status.st_mtime_ns, status.st_size
        if path not in self._read or self._read[path][0] != version:
            try:
                self._read[path] = version, read_artifact(path)
            except PolicyError as error:
                self._read[path] = version, str(error)
        return self._read[path][1]


def _made(artifact: Artifact) -> datetime:
    return artifact.created


def _names(artifacts: Iterable[Artifact]) -> dict[str, str]:
    """By source id; two models of one name get the beginning of their ids with it."""
    named = {side.source_id: side.name for one in artifacts for side in (one.sender, one.receiver)}
    plain = list(named.values())
    return {
        source: name if plain.count(name) == 1 else f"{name} ({source[:8]})" for source, name in named.items()
    }


def _reports(store: Tier) -> tuple[list[Report], str | None]:
    try:
        return read_reports(store.reports()), None
    except StorageError as error:
        return [], str(error)


def _sum(counts: Mapping[tuple[str, ...], float], name: str) -> float:
    return sum(value for path, value in counts.items() if path[:2] == ("count", name))


def _matrix(pairs: Sequence[Pair]) -> Matrix:
    used: dict[str, float] = {}
    for pair in pairs:
        for model in {pair.sender, pair.receiver}:
            used[model] = used.get(model, 0) + pair.tokens
    shown = sorted(used, key=lambda model: -used[model])[:_MOST_MODELS]
    cells = {
        (pair.sender, pair.receiver): pair
        for pair in pairs
        if pair.sender in shown and pair.receiver in shown
    }
    senders = [model for model in shown if any(sender == model for sender, _ in cells)]
    receivers = [model for model in shown if any(receiver == model for _, receiver in cells)]
    return Matrix(senders, receivers, cells, len(used) - len(shown))


def _drift(reports: Iterable[Report]) -> list[Drift]:
    """By pair, from whoever told last."""
    latest: dict[tuple[str, str], Drift] = {}
    for report in reports:
        for one in report.drift:
            latest.setdefault((one.sender, one.receiver), one)
    return list(latest.values())


def _engines(reports: Iterable[Report], now: datetime) -> list[Engine]:
    return [
        Engine(
            report,
            max(timedelta(0), now - report.updated),
            int(_sum(report.sums(), "requests")),
            report.counters.get("requests", {}).get("applied", 0),
        )
        for report in reports
        if report.engine != TOTAL
    ]

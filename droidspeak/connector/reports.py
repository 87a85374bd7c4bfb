"""Reports: what the engines that share a store have done, kept beside it, so that it outlives them.

    a process      one document, replaced every few seconds while there is traffic (`reporter`)
    many of them   those of ended processes are folded into one, `total`
    a reader       `read_reports`, then sums: `pairs_of`, `counts_of`

Every number is a sum since its document began, so documents are added up as they are, and nothing is counted
twice: a document that a total names as folded does not count any more, whether it is still there or not. A
process that kept silent for a while begins a new document, since the old one may be folded by then.

Format `droidspeak-report-1`. A document of another format is passed over, and stays.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
)

from droidspeak.storage.reports import TOTAL, Folded

__all__ = [
    "FORMAT",
    "MOST_DRIFT",
    "NEW_AFTER",
    "OTHER",
    "Drift",
    "Pair",
    "Report",
    "Sums",
    "TierLoad",
    "counts_of",
    "encoded",
    "fold_reports",
    "pairs_of",
    "parse_report",
    "read_reports",
]

FORMAT = "droidspeak-report-1"
OTHER = "other"
"""Stands for the models of the pairs that a document had no room for."""

NEW_AFTER = timedelta(minutes=20)
"""A process that has been silent for so long begins a new document."""

# Clocks of different machines may be apart, but not by the rest.
_OVER_AFTER = timedelta(hours=1)
_MOST_DOCUMENTS = 64
_MOST_PAIRS = 256
MOST_DRIFT = 128


class Sums(dict[tuple[str, ...], float]):
    """Figures by what they are of: `("pair", sender, receiver, "tokens")`, `("count", "reasons", "miss")`,
    `("event", "hits", "cpu")`, `("tier", "disk", "seconds")`."""

    def add(self, more: Mapping[tuple[str, ...], float]) -> None:
        """Adds `more` to what is there."""
        for path, value in more.items():
            self[path] = self.get(path, 0) + value

    def since(self, before: Mapping[tuple[str, ...], float]) -> Sums:
        """What has come after `before`."""
        return Sums(
            {path: value - past for path, value in self.items() if value > (past := before.get(path, 0))}
        )


_Model = Annotated[str, Field(pattern=f"^([0-9a-f]{{64}}|{OTHER})$")]
_Name = Annotated[str, Field(max_length=200)]
_Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
_Amount = Annotated[FiniteFloat, Field(ge=0, strict=True)]
_Switch = Annotated[bool, Field(strict=True)]
_Table = Annotated[dict[_Name, Annotated[dict[_Name, _Count], Field(max_length=256)]], Field(max_length=64)]


def _no_number(value: object) -> object:
    if isinstance(value, int | float):
        raise ValueError("allowed are times as text")
    return value


_Moment = Annotated[AwareDatetime, BeforeValidator(_no_number)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pair(_Part):
    """What one model got from one model's caches; from its own where both are the same.

    Attributes:
        requests: that used some of it.
        tokens: that were taken from it.
        tokens_saved: of prefill work: tokens, times the share of the layers that were not recomputed.
        bytes_loaded: that came out of the store, as they are stored.
        bytes_unstored: of the sender's chunks that the receiver did not have to store too: each chunk once
            for each process.
    """

    sender: _Model
    receiver: _Model
    requests: _Count = 0
    tokens: _Count = 0
    tokens_saved: _Amount = 0.0
    bytes_loaded: _Count = 0
    bytes_unstored: _Count = 0


class TierLoad(_Part):
    """Decoded bytes that loads got from a tier, and the seconds in which they were read."""

    bytes: _Count = 0
    seconds: _Amount = 0.0


class Drift(_Part):
    """A pair as the drift guard sees it now; see `droidspeak.layerselect.drift.DriftState`."""

    sender: _Model
    receiver: _Model
    drifted: _Switch
    samples: _Count
    agreement: _Amount | None
    kl: _Amount | None
    observed: _Count


class Report(_Part):
    """One document.

    Attributes:
        id: of the document; the same wherever a copy of it is.
        engine: `transformers`, `vllm`, ..., or `total`.
        started, updated: of the document: since when it counts, and until when.
        ended: the process has closed its connector.
        processes: that are in it.
        folded: ids that do not count any more, since this document has them.
        counters: of the connector, by name and label.
        events: of the store, by name and tier (empty where it is of no tier).
        drift: of a process that is alive, its latest state.
    """

    format: Literal["droidspeak-report-1"] = "droidspeak-report-1"
    id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    engine: _Name
    host: _Name = ""
    pid: _Count = 0
    started: _Moment
    updated: _Moment
    ended: _Switch = False
    processes: _Count = 1
    folded: Annotated[tuple[str, ...], Field(max_length=1024)] = ()
    pairs: Annotated[tuple[Pair, ...], Field(max_length=_MOST_PAIRS + 1)] = ()
    tiers: Annotated[dict[_Name, TierLoad], Field(max_length=64)] = {}
    counters: _Table = {}
    events: _Table = {}
    drift: Annotated[tuple[Drift, ...], Field(max_length=MOST_DRIFT)] = ()

    def sums(self) -> Sums:
        """The figures of it that add up."""
        found = Sums()
        for pair in self.pairs:
            figures = pair.model_dump(exclude={"sender", "receiver"})
            found.add({("pair", pair.sender, pair.receiver, name): value for name, value in figures.items()})
        for tier, load in self.tiers.items():
            found.add({("tier", tier, name): value for name, value in load.model_dump().items()})
        for kind, table in (("count", self.counters), ("event", self.events)):
            for name, labels in table.items():
                found.add({(kind, name, label): value for label, value in labels.items()})
        return found

    @classmethod
    def of(cls, sums: Sums, **rest: object) -> Report:
        """The report of these figures; `rest` are the other attributes.

        Pairs beyond the bound, those with the fewest tokens, go into one of `OTHER`.
        """
        tiers: dict[str, dict[str, float]] = {}
        tables: dict[str, dict[str, dict[str, float]]] = {"count": {}, "event": {}}
        for (kind, *path), value in sums.items():
            if kind == "tier":
                tiers.setdefault(path[0], {})[path[1]] = value
            elif kind in tables:
                tables[kind].setdefault(path[0], {})[path[1]] = value
        content = {
            "pairs": _bounded(_pairs(sums)),
            "tiers": tiers,
            "counters": tables["count"],
            "events": tables["event"],
        }
        return cls.model_validate({**content, **rest})


def _pairs(sums: Sums) -> list[Pair]:
    """Most tokens first."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (kind, *path), value in sums.items():
        if kind == "pair":
            found.setdefault((path[0], path[1]), {})[path[2]] = value
    pairs = (
        Pair.model_validate({"sender": sender, "receiver": receiver, **figures})
        for (sender, receiver), figures in found.items()
    )
    return sorted(pairs, key=lambda pair: (-pair.tokens, pair.sender, pair.receiver))


def _bounded(pairs: list[Pair]) -> list[Pair]:
    named = [pair for pair in pairs if pair.sender != OTHER]
    rest = [pair for pair in pairs if pair.sender == OTHER] + named[_MOST_PAIRS:]
    kept = named[:_MOST_PAIRS]
    if rest:
        names = ("requests", "tokens", "tokens_saved", "bytes_loaded", "bytes_unstored")
        sums = {name: sum(getattr(pair, name) for pair in rest) for name in names}
        kept.append(Pair.model_validate({"sender": OTHER, "receiver": OTHER, **sums}))
    return kept


def encoded(report: Report) -> bytes:
    """The document."""
    return report.model_dump_json().encode()


def parse_report(data: bytes) -> Report | None:
    """The report in a document; `None` of what is none."""
    try:
        return Report.model_validate_json(data)
    except ValidationError:
        return None


def read_reports(documents: Iterable[tuple[str, bytes]]) -> list[Report]:
    """The reports that count, of documents from one or several stores; the latest comes first."""
    latest: dict[str, Report] = {}
    for _, data in documents:
        report = parse_report(data)
        if report and (report.id not in latest or latest[report.id].updated < report.updated):
            latest[report.id] = report
    folded = {name for report in latest.values() for name in report.folded}
    counting = (report for report in latest.values() if report.id not in folded)
    return sorted(counting, key=lambda report: report.updated, reverse=True)


def counts_of(reports: Iterable[Report]) -> Sums:
    """The sums over all of them."""
    total = Sums()
    for report in reports:
        total.add(report.sums())
    return total


def pairs_of(reports: Iterable[Report]) -> list[Pair]:
    """What each model got from each, over all of them; most tokens first."""
    return _pairs(counts_of(reports))


def fold_reports(documents: Mapping[str, bytes], now: datetime | None = None) -> Folded | None:
    """Makes one of the documents of processes that have ended, if there are many documents.

    A `droidspeak.storage.reports.Fold`. One that has not been heard of for an hour has ended.
    """
    reports = {name: report for name, data in documents.items() if (report := parse_report(data))}
    total = reports.pop(TOTAL, None)
    if len(reports) <= _MOST_DOCUMENTS or (total is None and TOTAL in documents):
        return None
    now = now or datetime.now(UTC)
    left = {name for name, report in reports.items() if total and report.id in total.folded}
    over = {
        name: report
        for name, report in reports.items()
        if name not in left and (report.ended or now - report.updated > _OVER_AFTER)
    }
    if not over and not left:
        return None
    merged = [report for report in (total, *over.values()) if report]
    new = Report.of(
        counts_of(merged),
        id=total.id if total else uuid.uuid4().hex,
        engine=TOTAL,
        started=min(report.started for report in merged),
        updated=max(report.updated for report in merged),
        processes=sum(report.processes for report in merged),
        folded=[report.id for name, report in reports.items() if name in left or name in over],
    )
    return Folded(encoded(new), [*left, *over])

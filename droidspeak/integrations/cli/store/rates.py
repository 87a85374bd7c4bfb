"""What happens a second, from one look at the engines' reports to the next.

Engines tell every few seconds, each at its own time. What one has told since its last report is divided by
the seconds between the two, whenever one looks, and holds until it tells again or was silent for a while.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from droidspeak.connector.reports import Report, Sums
from droidspeak.storage.reports import TOTAL

__all__ = ["Rates"]

_SILENT_AFTER = timedelta(seconds=15)
_NAMES = ("requests", "applied", "tokens_own", "tokens_shared", "tokens_saved")


class Rates:
    """Remembers the last look."""

    def __init__(self) -> None:
        self._looked = False
        self._seen: dict[str, Report] = {}
        self._rates: dict[str, Sums] = {}

    def of(self, reports: Iterable[Report], now: datetime | None = None) -> dict[str, Any] | None:
        """Sums over the engines that tell; `None` at the first look."""
        first, self._looked = not self._looked, True
        now = now or datetime.now(UTC)
        alive = {report.id: report for report in reports if report.engine != TOTAL}
        for report in alive.values():
            self._take(report, known=first)
        self._seen = alive
        if first:
            return None
        total = Sums()
        for report in alive.values():
            if now - report.updated <= _SILENT_AFTER:
                total.add(self._rates.get(report.id, {}))
        return _shown(total)

    def _take(self, report: Report, *, known: bool) -> None:
        before = self._seen.get(report.id)
        if known or (before and before.updated == report.updated):
            return
        # A process that is new since the last look has told everything since then.
        since = before.updated if before else report.started
        seconds = max((report.updated - since).total_seconds(), 1e-3)
        more = report.sums().since(before.sums() if before else Sums())
        self._rates[report.id] = Sums({path: value / seconds for path, value in more.items()})


def _shown(rates: Sums) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(_NAMES, 0.0)
    found |= {"loads": {}, "events": {}}
    for path, value in rates.items():
        match path:
            case ("count", "requests", status):
                found["requests"] += value
                found["applied"] += value if status == "applied" else 0
            case ("pair", sender, receiver, "tokens"):
                found["tokens_own" if sender == receiver else "tokens_shared"] += value
            case ("pair", _, _, "tokens_saved"):
                found["tokens_saved"] += value
            case ("tier", tier, "bytes"):
                found["loads"][tier] = value
            case ("event", name, tier):
                found["events"].setdefault(name, {})[tier] = value
    return found

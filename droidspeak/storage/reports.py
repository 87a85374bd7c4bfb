"""Reports: small documents that engines leave beside the chunks, so that their figures outlive them.

What a report says is no concern of storage (`droidspeak.connector.reports` knows). Of a tier that keeps them:

    put_report(name, data)    replaces the document of that name, all or nothing
    reports()                 all documents
    fold_reports(fold)        makes many documents one, `TOTAL`, so that their number stays bounded

In a folder they are `reports/NAME.json`. A fold writes the total first and then takes away what the total now
stands for; whoever folds must know by the documents themselves what an interrupted fold has left.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from droidspeak.errors import TierFull, UsageError
from droidspeak.storage.chunkfolder import locked_folder, named

__all__ = ["MOST_REPORT_BYTES", "TOTAL", "Fold", "Folded", "ReportFolder", "check_report", "is_report_name"]

TOTAL = "total"
MOST_REPORT_BYTES = 256 << 10
_MOST_REPORTS = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_LEFT_BEHIND_SECONDS = 3600.0


@dataclass(frozen=True)
class Folded:
    """What a fold makes of all documents.

    Attributes:
        total: the new document `TOTAL`.
        gone: names of the documents that it stands for.
    """

    total: bytes
    gone: Collection[str]


Fold: TypeAlias = Callable[[Mapping[str, bytes]], Folded | None]
"""Told all documents by name; `None` leaves them as they are."""


def is_report_name(text: str) -> bool:
    """Whether a document may be called so."""
    return _NAME.fullmatch(text) is not None


def check_report(name: str, data: bytes) -> None:
    """Raises `UsageError` for a name or a size that is not allowed."""
    if not is_report_name(name):
        raise UsageError(f"report {name[:120]!r}: allowed are up to 100 letters, digits, - and _")
    if len(data) > MOST_REPORT_BYTES:
        raise UsageError(f"report {name}: {len(data)} bytes; allowed are {MOST_REPORT_BYTES}")


class ReportFolder:
    """Documents in `root/reports`, shared by processes. Methods raise `TierUnavailable` if they cannot."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "reports"

    def put(self, name: str, data: bytes) -> None:
        """As of a tier.

        Raises:
            UsageError: as `check_report`.
            TierFull: there are too many documents.
        """
        check_report(name, data)
        with named(self._folder):
            self._folder.mkdir(exist_ok=True)
            if not self._path(name).exists() and sum(1 for _ in self._names()) >= _MOST_REPORTS:
                raise TierFull(f"{self._folder}: {_MOST_REPORTS} reports are there; none is added")
            self._replace(name, data)

    def all(self) -> Iterator[tuple[str, bytes]]:
        """As of a tier; what is larger than a report can be is passed over."""
        with named(self._folder):
            for name in sorted(self._names()):
                with suppress(FileNotFoundError), self._path(name).open("rb") as file:
                    data = file.read(MOST_REPORT_BYTES + 1)
                    if len(data) <= MOST_REPORT_BYTES:
                        yield name, data

    def fold(self, fold: Fold) -> None:
        """As of a tier; one process at a time."""
        with named(self._folder):
            if not self._folder.exists():
                return
            with locked_folder(self._folder):
                folded = fold(dict(self.all()))
                if folded is not None:
                    check_report(TOTAL, folded.total)
                    self._replace(TOTAL, folded.total)
                    for name in folded.gone:
                        self._path(name).unlink(missing_ok=True)
                    self._sweep()

    def _names(self) -> Iterator[str]:
        with suppress(FileNotFoundError):
            for file in os.listdir(self._folder):
                name, suffix = os.path.splitext(file)
                if suffix == ".json" and is_report_name(name):
                    yield name

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _replace(self, name: str, data: bytes) -> None:
        temporary = self._folder / f".{name}.{os.getpid()}.new"
        try:
            temporary.write_bytes(data)
            temporary.replace(self._path(name))
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Takes away what processes that were killed while they wrote have left."""
        for path in self._folder.glob(".*.new"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                    path.unlink()

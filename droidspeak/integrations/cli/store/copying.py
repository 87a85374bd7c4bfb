"""What copy, export and import say of what they did."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from droidspeak.errors import DroidSpeakError
from droidspeak.integrations.cli.output import Format, note, show_document, show_table
from droidspeak.integrations.cli.store.showing import size_text
from droidspeak.storage.transfer import Copied, Fate

__all__ = ["Outcome"]

_SHOWN = 20


@dataclass
class Outcome:
    """Chunks and bytes by fate, and what failed."""

    chunks: dict[Fate, int] = field(default_factory=lambda: dict.fromkeys(Fate, 0))
    nbytes: dict[Fate, int] = field(default_factory=lambda: dict.fromkeys(Fate, 0))
    failed: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def take(self, told: Generator[Copied, None, None], moved: Callable[[int], None]) -> None:
        """Counts all of `told` as they come; `moved` is called with the bytes that are done.

        However this ends, nothing of `told` is under way then.
        """
        with closing(told):
            for copied in told:
                self.add(copied)
                moved(copied.nbytes)

    def add(self, copied: Copied) -> None:
        """One more chunk."""
        self.chunks[copied.fate] += 1
        self.nbytes[copied.fate] += copied.nbytes
        if copied.fate is Fate.FAILED:
            self.fail(str(copied.key), copied.detail)

    def fail(self, key: str | None, detail: str) -> None:
        """Notes what could not be done."""
        self.failed.append({"key": key, "detail": detail})
        if len(self.failed) <= _SHOWN:
            note(detail)

    def document(self, **more: Any) -> dict[str, Any]:
        """As JSON tells it."""
        by_fate = {
            fate.value: {"chunks": self.chunks[fate], "bytes": self.nbytes[fate]}
            for fate in (Fate.COPIED, Fate.HELD, Fate.GONE)
        }
        seconds = round(time.monotonic() - self.started, 3)
        return {"version": 1, **more, **by_fate, "failed": self.failed, "seconds": seconds}

    @contextmanager
    def shown(self, format: Format, title: str, **more: Any) -> Iterator[None]:
        """Shows the result of what is done inside, also where it ends with an error: so much is there."""
        try:
            yield
        except DroidSpeakError:
            self.show(format, title, **more)
            raise
        self.show(format, title, **more)

    def show(self, format: Format, title: str, **more: Any) -> None:
        """The result."""
        show_document(format, self.document(**more), lambda: self._table(title))

    def _table(self, title: str) -> None:
        rows = [
            [fate.value, str(self.chunks[fate]), size_text(self.nbytes[fate])]
            for fate in Fate
            if self.chunks[fate] or fate is Fate.COPIED
        ]
        show_table(title, ["", "chunks", "size"], rows)

    def require_all(self) -> None:
        """Raises `DroidSpeakError` if something failed."""
        if self.failed:
            count = len(self.failed)
            raise DroidSpeakError(f"{count} chunk{'' if count == 1 else 's'} could not be copied")

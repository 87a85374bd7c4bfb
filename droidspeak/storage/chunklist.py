"""The chunks that a copy or an export is for: listed once at its start, and not kept in memory.

A million keys are half a GiB of objects. Here they are rows of one of SQLite's temporary databases: what does
not fit into its cache of some MiB is in a file without a name, which is gone with the list.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from droidspeak.errors import StorageError
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.selection import Selection
from droidspeak.storage.tier import Tier

__all__ = ["ChunkList", "Row"]

Row = tuple[Tier, ChunkKey, int]
"""A chunk: who holds it, its key, its bytes."""

_TABLE = "CREATE TABLE listed (key TEXT PRIMARY KEY, tier INTEGER, nbytes INTEGER) WITHOUT ROWID"


class ChunkList:
    """The chunks of `tiers` that `selection` means; each once, as of the first tier that has it, by key.

    What comes and goes in the tiers later changes nothing here. To be used by one thread.

    Raises:
        TierUnavailable, TierTimeout: a tier cannot be listed.
        StorageError: there is no room for the list in the folder of temporary files.
    """

    def __init__(self, tiers: Iterable[Tier], selection: Selection) -> None:
        self._tiers = list(tiers)
        self._rows = sqlite3.connect("", isolation_level=None)
        try:
            self._fill(selection)
        except BaseException:
            self.close()
            raise

    def _fill(self, selection: Selection) -> None:
        with _guarded():
            # Nobody goes on with a list that was broken off.
            self._rows.execute("PRAGMA journal_mode = OFF")
            self._rows.execute(_TABLE)
            self._rows.execute("BEGIN")
            for number, tier in enumerate(self._tiers):
                found = ((str(one.info.key), number, one.info.nbytes) for one in tier.select(selection))
                self._rows.executemany("INSERT OR IGNORE INTO listed VALUES (?, ?, ?)", found)
            self._rows.execute("COMMIT")

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks together."""
        return int(self._ask("SELECT coalesce(sum(nbytes), 0) FROM listed")[0][0])

    def __len__(self) -> int:
        return int(self._ask("SELECT count(*) FROM listed")[0][0])

    def __iter__(self) -> Iterator[Row]:
        with _guarded():
            for key, tier, nbytes in self._rows.execute("SELECT key, tier, nbytes FROM listed ORDER BY key"):
                yield self._tiers[tier], ChunkKey.parse(key), nbytes

    def find(self, key: ChunkKey) -> Row | None:
        """The row of `key`."""
        rows = self._ask("SELECT tier, nbytes FROM listed WHERE key = ?", str(key))
        return (self._tiers[rows[0][0]], key, rows[0][1]) if rows else None

    def discard(self, key: ChunkKey) -> bool:
        """Takes `key` off the list; whether it was on it."""
        return bool(self._ask("DELETE FROM listed WHERE key = ? RETURNING 1", str(key)))

    def _ask(self, sql: str, *values: str) -> list[tuple[int, ...]]:
        with _guarded():
            return self._rows.execute(sql, values).fetchall()

    def close(self) -> None:
        """Forgets the list. Calling it twice is fine."""
        self._rows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _guarded() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(f"the list of the chunks cannot be kept in a temporary file: {error}") from error

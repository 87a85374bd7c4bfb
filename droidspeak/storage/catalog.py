"""The disk tier's catalog: one SQLite file that says what the folder holds.

    chunks    one row per readable chunk: size, shape, last use, place in its eviction queue
    writes    one row per write under way; a row that outlives its writer is settled at the next open
    ghosts    keys that left after a single use (S3-FIFO)
    totals    chunks and bytes per source and queue, kept by triggers: no question scans the rows
    clock     order of the eviction queues: the wall clock in ns, but it never stands still

The chunk files are the durable contract, the catalog is an index over them: a catalog that is
missing, damaged or of another version is moved aside, and the tier makes a new one from the files.

Every change happens in a `transaction`, which holds SQLite's write lock over all processes. Questions
go over a second connection and, thanks to WAL, never wait for a change.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from droidspeak.errors import TierUnavailable
from droidspeak.storage.catalogfile import SCHEMA, damaged, move_aside, open_catalog, open_read_only, usable
from droidspeak.storage.eviction import Entry, Ledger
from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, SlotBytes, TierUsage

if TYPE_CHECKING:
    from droidspeak.storage.selection import Selection

__all__ = ["Catalog", "CatalogRow", "PendingWrite"]

_BATCH = 500
_PAGE = 1000
_Row = Sequence[Any]

# Every lookup of an engine reads the columns of the first line, and pays for more.
_BRIEF = "key, tokens, nbytes, e_layers, codec, salt"
_INFO = f"{_BRIEF}, header_bytes, k_bytes, v_bytes, e_bytes"
_RECORD = f"{_INFO}, created, used, hits, pinned"

_PUT = """
    INSERT INTO chunks (key, nbytes, queue, place, hits, pinned) VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET nbytes = excluded.nbytes, queue = excluded.queue,
        place = excluded.place, hits = excluded.hits, pinned = excluded.pinned"""

_COMMITTED = """
    SELECT (SELECT coalesce(sum(nbytes), 0) FROM totals)
         + (SELECT coalesce(sum(nbytes), 0) FROM writes)
         - (SELECT coalesce(sum(nbytes), 0) FROM chunks WHERE key IN (SELECT key FROM writes))"""

_REMEMBERED = """
    UPDATE chunks SET (queue, place, hits, pinned, created, used) =
        (SELECT queue, place, hits, pinned, created, used FROM remembered WHERE key = chunks.key)
    WHERE key IN (SELECT key FROM remembered)"""


@dataclass(frozen=True, slots=True)
class CatalogRow:
    """A chunk and the bytes of its header, so that one request fetches the header."""

    info: ChunkInfo
    header_bytes: int


@dataclass(frozen=True, slots=True)
class PendingWrite:
    """A write under way. `temp` is relative to the tier's root; `writer` names the process."""

    temp: str
    key: ChunkKey
    nbytes: int
    writer: str


class Catalog(Ledger):
    """Rows of chunks and writes, and the ledger of the eviction policy over them.

    Attributes:
        fresh: the catalog has just been made and the files must still be scanned into it.

    Args:
        path: the SQLite file. Whoever opens it for writing keeps others from opening it meanwhile.
        read_only: nothing is written, not even SQLite's own side files if none are there.

    All methods raise `TierUnavailable` when the file cannot be read or written.
    """

    def __init__(self, path: Path, *, read_only: bool = False, max_ghosts: int = 100_000) -> None:
        self._path = path
        self._max_ghosts = max_ghosts
        self._reading, self._writing = threading.Lock(), threading.RLock()
        self._inode = 0
        self.fresh = False
        with self._guarded():
            if read_only:
                self._reader = self._writer = open_read_only(path)
            else:
                self.fresh = not usable(path)
                self._writer, self._reader = open_catalog(path), open_catalog(path)
                self._inode = path.stat().st_ino

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that happens inside is kept, or none of it; other writers of the folder wait.

        A new catalog gets its tables in its first transaction and is marked as complete with it.
        """
        with self._writing, self._guarded():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                if self.fresh:
                    for statement in SCHEMA:
                        self._writer.execute(statement)
                yield
                self._writer.execute("COMMIT")
                self.fresh = False
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def get(self, key: ChunkKey) -> Entry | None:
        rows = self._change("SELECT key, nbytes, queue, hits, pinned FROM chunks WHERE key = ?", str(key))
        return _entry(rows[0]) if rows else None

    def put(self, entry: Entry) -> None:
        tick = self._change("UPDATE clock SET tick = max(tick + 1, ?) RETURNING tick", time.time_ns())[0][0]
        self._change(_PUT, str(entry.key), entry.nbytes, entry.queue, tick, entry.hits, entry.pinned)

    def set_hits(self, key: ChunkKey, hits: int) -> None:
        self._change("UPDATE chunks SET hits = ? WHERE key = ?", hits, str(key))

    def oldest(self, queue: str) -> Entry | None:
        rows = self._change(
            "SELECT key, nbytes, queue, hits, pinned FROM chunks"
            " WHERE queue = ? AND pinned = 0 ORDER BY place LIMIT 1",
            queue,
        )
        return _entry(rows[0]) if rows else None

    def nbytes(self, queue: str | None = None) -> int:
        total = "SELECT coalesce(sum(nbytes), 0) FROM totals WHERE ?1 IS NULL OR queue = ?1"
        return int(self._change(total, queue)[0][0])

    def remember_ghost(self, key: ChunkKey) -> None:
        self._change("INSERT OR REPLACE INTO ghosts (key) VALUES (?)", str(key))
        self._change("DELETE FROM ghosts WHERE age <= (SELECT max(age) FROM ghosts) - ?", self._max_ghosts)

    def forget_ghost(self, key: ChunkKey) -> bool:
        return bool(self._change("DELETE FROM ghosts WHERE key = ? RETURNING 1", str(key)))

    def find(self, key: ChunkKey) -> CatalogRow | None:
        """The row of `key`."""
        text = str(key)
        row = self._rows([text]).get(text)
        return CatalogRow(_info(key, row), row[6]) if row else None

    def rows(self, keys: Collection[ChunkKey]) -> dict[ChunkKey, CatalogRow]:
        """The rows of those of some hundred `keys` that have one."""
        rows = self._rows([str(key) for key in keys])
        held = ((key, rows.get(str(key))) for key in keys)
        return {key: CatalogRow(_info(key, row), row[6]) for key, row in held if row}

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        """Infos of the longest run of `keys`, from the first, without a gap; bytes by kind are left out."""
        found: list[ChunkInfo] = []
        # Most runs are short: batches grow, so that a miss at the start costs one small question.
        start, size = 0, 16
        while start < len(keys):
            batch = [(str(key), key) for key in keys[start : start + size]]
            rows = self._rows([text for text, _ in batch], _BRIEF)
            for text, key in batch:
                if text not in rows:
                    return found
                found.append(_brief(key, rows[text]))
            start, size = start + size, min(4 * size, _BATCH)
        return found

    def keys(self) -> Iterator[ChunkKey]:
        """All keys in order, fetched page by page; no snapshot is held in between."""
        after = ""
        while page := self._ask(f"SELECT key FROM chunks WHERE key > ? ORDER BY key LIMIT {_PAGE}", after):
            yield from (ChunkKey.parse(key) for (key,) in page)
            after = page[-1][0]

    def select(self, selection: Selection, tier: str) -> Iterator[ChunkRecord]:
        """The records that `selection` asks for, as of the tier called `tier`.

        They come page by page; no snapshot is held in between. An order is made in a table of its own.
        """
        with self._guarded(), closing(self._scanner()) as scanner:
            pages = _in_order if selection.sort else _by_key
            for row in pages(scanner, selection, tier):
                yield _record(row, tier)

    def slot_bytes(self) -> dict[SourceId, SlotBytes]:
        """Bytes per source model and kind. Looks at every row."""
        sums = "SELECT total(k_bytes), total(v_bytes), total(e_bytes) FROM chunks WHERE key >= ? AND key < ?"
        with self._guarded(), closing(self._scanner()) as scanner:
            return {
                source: SlotBytes(*map(int, scanner.execute(sums, (source, f"{source}g")).fetchone()))
                for source in self.sources()
            }

    def _scanner(self) -> sqlite3.Connection:
        """A connection for long questions, in front of which no short one shall wait."""
        return open_read_only(self._path) if self._reader is self._writer else open_catalog(self._path)

    def describe(self, info: ChunkInfo, header_bytes: int, created: int) -> None:
        """Fills in the row of an admitted chunk; `created` is in ns since the epoch."""
        layers = ",".join(map(str, info.e_layers))
        slots = info.slots or (None, None, None)
        values = (info.tokens, header_bytes, layers, info.codec, info.salt, *slots, created, created)
        self._change(
            "UPDATE chunks SET tokens = ?, header_bytes = ?, e_layers = ?, codec = ?, salt = ?, k_bytes = ?,"
            " v_bytes = ?, e_bytes = ?, created = ?, used = ? WHERE key = ?",
            *values,
            str(info.key),
        )

    def is_as(self, record: ChunkRecord) -> bool:
        """Whether the chunk is there and was not replaced, used, pinned or unpinned since it was listed."""
        values = (str(record.info.key), record.info.nbytes, record.created, record.used, record.pinned)
        same = "key = ? AND nbytes = ? AND created = ? AND used = ? AND pinned = ?"
        return bool(self._change(f"SELECT 1 FROM chunks WHERE {same}", *values))

    def set_used(self, key: ChunkKey, used: int) -> None:
        """Notes the time of the last use, in ns since the epoch."""
        self._change("UPDATE chunks SET used = ? WHERE key = ?", used, str(key))

    def set_pinned(self, key: ChunkKey, pinned: bool) -> bool:
        """Pins or unpins `key`; whether it is there."""
        return bool(self._change("UPDATE chunks SET pinned = ? WHERE key = ? RETURNING 1", pinned, str(key)))

    def remove(self, key: ChunkKey) -> bool:
        """Forgets `key`; whether it was there."""
        return bool(self._change("DELETE FROM chunks WHERE key = ? RETURNING 1", str(key)))

    def sources(self) -> dict[SourceId, TierUsage]:
        """Chunks and bytes per source model."""
        rows = self._ask("SELECT source, sum(chunks), sum(nbytes) FROM totals GROUP BY source")
        return {SourceId(source): TierUsage(chunks, nbytes) for source, chunks, nbytes in rows if chunks}

    def usage(self) -> TierUsage:
        """Chunks and bytes of all that is readable."""
        chunks, nbytes = self._ask("SELECT total(chunks), total(nbytes) FROM totals")[0]
        # The index has only the pinned.
        pinned = self._ask("SELECT total(nbytes) FROM chunks WHERE pinned = 1")[0][0]
        return TierUsage(int(chunks), int(nbytes), pinned=int(pinned))

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Starts with no chunks; whoever is admitted again inside keeps its pin and its place."""
        columns = "key, queue, place, hits, pinned, created, used"
        self._change(
            "CREATE TEMP TABLE remembered (key TEXT PRIMARY KEY, queue, place, hits, pinned, created, used)"
        )
        self._change(f"INSERT INTO remembered SELECT {columns} FROM chunks")
        self._change("DELETE FROM chunks")
        yield
        # A file that no row speaks of stands where its age puts it.
        self._change("UPDATE chunks SET place = created")
        self._change(_REMEMBERED)
        self._change("DROP TABLE remembered")

    def begin_write(self, write: PendingWrite) -> None:
        """Notes an intent and reserves its bytes."""
        values = (write.temp, str(write.key), write.nbytes, write.writer)
        self._change("INSERT INTO writes VALUES (?, ?, ?, ?)", *values)

    def end_write(self, write: PendingWrite) -> None:
        """Drops the intent."""
        self._change("DELETE FROM writes WHERE temp = ?", write.temp)

    def writes(self) -> list[PendingWrite]:
        """All intents, of all processes."""
        rows = self._change("SELECT temp, key, nbytes, writer FROM writes")
        return [PendingWrite(temp, ChunkKey.parse(key), size, writer) for temp, key, size, writer in rows]

    def committed(self) -> int:
        """Bytes that will be held when all writes under way have replaced what they replace."""
        return int(self._change(_COMMITTED)[0][0])

    def close(self) -> None:
        """Closes both connections. Calling it twice is fine."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()

    def _rows(self, keys: Collection[str], columns: str = _INFO) -> dict[str, _Row]:
        marks = ",".join("?" * len(keys))
        rows = self._ask(f"SELECT {columns} FROM chunks WHERE key IN ({marks})", *keys)
        return {row[0]: row for row in rows}

    def _ask(self, sql: str, *values: Any) -> list[Any]:
        with self._reading, self._guarded():
            return self._reader.execute(sql, values).fetchall()

    def _change(self, sql: str, *values: Any) -> list[Any]:
        with self._writing, self._guarded():
            return self._writer.execute(sql, values).fetchall()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if damaged(error) and _inode(self._path) == self._inode:
                move_aside(self._path)
            raise TierUnavailable(f"{self._path}: {error}") from error


def _entry(row: tuple[str, int, str, int, int]) -> Entry:
    key, nbytes, queue, hits, pinned = row
    return Entry(ChunkKey.parse(key), nbytes, queue, hits, bool(pinned))


def _info(key: ChunkKey, row: _Row, tier: str | None = None) -> ChunkInfo:
    return ChunkInfo(key, row[1], row[2], _layers(row[3]), row[4], tier, row[5], _slots(*row[7:10]))


def _brief(key: ChunkKey, row: _Row) -> ChunkInfo:
    return ChunkInfo(key, row[1], row[2], _layers(row[3]), row[4], None, row[5])


def _record(row: _Row, tier: str) -> ChunkRecord:
    info = _info(ChunkKey.parse(row[0]), row, tier)
    return ChunkRecord(info, row[10], row[11], row[12], bool(row[13]))


def _by_key(scanner: sqlite3.Connection, selection: Selection, tier: str) -> Iterator[_Row]:
    where, values = selection.sql(tier)
    sql = f"SELECT {_RECORD} FROM chunks WHERE key > ? AND ({where}) ORDER BY key LIMIT ?"
    after, left = "", sys.maxsize if selection.limit is None else selection.limit
    while page := scanner.execute(sql, (after, *values, min(left, _PAGE))).fetchall():
        yield from page
        after, left = page[-1][0], left - len(page)


def _in_order(scanner: sqlite3.Connection, selection: Selection, tier: str) -> Iterator[_Row]:
    where, values = selection.sql(tier)
    limit = -1 if selection.limit is None else selection.limit
    scanner.execute("PRAGMA query_only = 0")  # it forbids tables of one's own too
    scanner.execute(
        f"CREATE TEMP TABLE listed AS SELECT {_RECORD} FROM chunks WHERE {where} LIMIT ?", (*values, limit)
    )
    after = 0
    page = f"SELECT {_RECORD}, rowid FROM listed WHERE rowid > ? ORDER BY rowid LIMIT {_PAGE}"
    while rows := scanner.execute(page, (after,)).fetchall():
        yield from rows
        after = rows[-1][-1]


@lru_cache
def _slots(k: int | None, v: int | None, e: int | None) -> SlotBytes | None:
    return None if k is None or v is None or e is None else SlotBytes(k, v, e)


@lru_cache
def _layers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None

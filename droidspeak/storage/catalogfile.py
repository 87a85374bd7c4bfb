"""The catalog's SQLite file: its tables, how it is opened, and what is done when it is damaged."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from droidspeak.errors import TierUnavailable

__all__ = [
    "SCHEMA",
    "damaged",
    "held_still",
    "move_aside",
    "open_catalog",
    "open_read_only",
    "usable",
]

VERSION = 2
_BUSY_SECONDS = 10.0
_PRAGMAS = (
    "synchronous = NORMAL",
    "journal_mode = WAL",
    "cache_size = -16384",  # KiB
    "journal_size_limit = 67108864",
)
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_REFUSED = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}

_PINNED = "CREATE INDEX pinned ON chunks (pinned, nbytes) WHERE pinned = 1"

# What makes the tables of an older version those of the next one. A process of the older release that has
# the catalog open goes on: it names the columns that it knows.
_STEPS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE chunks ADD COLUMN salt TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE chunks ADD COLUMN k_bytes INTEGER",
        "ALTER TABLE chunks ADD COLUMN v_bytes INTEGER",
        "ALTER TABLE chunks ADD COLUMN e_bytes INTEGER",
        _PINNED,
    ),
}

SCHEMA = (
    """CREATE TABLE chunks (
        key TEXT PRIMARY KEY,
        nbytes INTEGER NOT NULL,
        queue TEXT NOT NULL,
        place INTEGER NOT NULL,
        hits INTEGER NOT NULL,
        pinned INTEGER NOT NULL,
        tokens INTEGER NOT NULL DEFAULT 0,
        header_bytes INTEGER NOT NULL DEFAULT 0,
        e_layers TEXT NOT NULL DEFAULT '',
        codec TEXT NOT NULL DEFAULT 'raw',
        created INTEGER NOT NULL DEFAULT 0,
        used INTEGER NOT NULL DEFAULT 0,
        salt TEXT NOT NULL DEFAULT '',
        k_bytes INTEGER,
        v_bytes INTEGER,
        e_bytes INTEGER
    ) WITHOUT ROWID""",
    "CREATE INDEX eviction ON chunks (queue, place) WHERE pinned = 0",
    _PINNED,
    """CREATE TABLE writes (
        temp TEXT PRIMARY KEY,
        key TEXT NOT NULL,
        nbytes INTEGER NOT NULL,
        writer TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE TABLE ghosts (age INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE)",
    "CREATE TABLE clock (tick INTEGER NOT NULL)",
    "INSERT INTO clock VALUES (0)",
    """CREATE TABLE totals (
        source TEXT,
        queue TEXT,
        chunks INTEGER NOT NULL,
        nbytes INTEGER NOT NULL,
        PRIMARY KEY (source, queue)
    ) WITHOUT ROWID""",
    """CREATE TRIGGER chunk_came AFTER INSERT ON chunks BEGIN
        INSERT INTO totals VALUES (substr(new.key, 1, 64), new.queue, 1, new.nbytes)
        ON CONFLICT DO UPDATE SET chunks = chunks + 1, nbytes = nbytes + excluded.nbytes;
    END""",
    """CREATE TRIGGER chunk_left AFTER DELETE ON chunks BEGIN
        UPDATE totals SET chunks = chunks - 1, nbytes = nbytes - old.nbytes
        WHERE source = substr(old.key, 1, 64) AND queue = old.queue;
    END""",
    """CREATE TRIGGER chunk_moved AFTER UPDATE OF queue, nbytes ON chunks
    WHEN old.queue <> new.queue OR old.nbytes <> new.nbytes BEGIN
        UPDATE totals SET chunks = chunks - 1, nbytes = nbytes - old.nbytes
        WHERE source = substr(old.key, 1, 64) AND queue = old.queue;
        INSERT INTO totals VALUES (substr(new.key, 1, 64), new.queue, 1, new.nbytes)
        ON CONFLICT DO UPDATE SET chunks = chunks + 1, nbytes = nbytes + excluded.nbytes;
    END""",
    f"PRAGMA user_version = {VERSION}",
)


def open_catalog(path: Path) -> sqlite3.Connection:
    """A connection for reading and writing; transactions are begun by hand."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    with ExitStack() as undo:
        undo.callback(connection.close)
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        undo.pop_all()
    return connection


def open_read_only(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing. Raises `sqlite3.Error` if there is no catalog of this version."""
    # Only with SQLite's side files does it see what others write from now on. Where they cannot be made, and
    # are not there, the file is whole, and `immutable` does without them.
    live = Path(f"{path}-wal").exists()
    shared = ("mode=rw",) if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK) else ()
    for options in (*shared, *(("mode=ro",) if live else ()), "mode=ro&immutable=1"):
        uri = f"{path.absolute().as_uri()}?{options}"
        connection = sqlite3.connect(
            uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        with ExitStack() as undo, suppress(sqlite3.OperationalError):
            undo.callback(connection.close)
            connection.execute("PRAGMA query_only = 1")
            if _version(connection) == VERSION:
                undo.pop_all()
                return connection
    raise sqlite3.OperationalError("no catalog of this version; open the folder once for writing")


@contextmanager
def held_still(path: Path) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A connection to a catalog that is there; inside `with still():`, no process can change it.

    On a read-only medium there is nobody to keep from it, and nothing is done.

    Raises:
        TierUnavailable: it cannot be opened, or another process does not let go of it.
    """
    uri = f"{path.absolute().as_uri()}?mode=rw"
    options: dict[str, Any] = {"isolation_level": None, "check_same_thread": False, "uri": True}
    with closing(sqlite3.connect(uri, timeout=_BUSY_SECONDS, **options)) as connection:

        @contextmanager
        def still() -> Iterator[None]:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                raise TierUnavailable(f"{path}: {error}") from error
            try:
                yield
            finally:
                connection.execute("ROLLBACK")

        yield still if _changeable(still) else nullcontext


def _changeable(still: Callable[[], AbstractContextManager[None]]) -> bool:
    try:
        with still():
            return True
    except TierUnavailable as error:
        if getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF not in _REFUSED:
            raise
        return False


def usable(path: Path) -> bool:
    """Whether there is a catalog; one of an older version is brought up to date, and one that cannot be used
    is moved aside."""
    if not path.exists():
        return False
    try:
        with closing(open_catalog(path)) as connection:
            version = _brought_up(connection)
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if not damaged(error):
            raise
        version, tables = -1, 1
    if version != VERSION and tables:
        move_aside(path)
    return version == VERSION


def _brought_up(connection: sqlite3.Connection) -> int:
    """The version of the catalog, after what could be done for it."""
    if _version(connection) not in _STEPS:
        return _version(connection)
    connection.execute("BEGIN IMMEDIATE")
    try:
        while statements := _STEPS.get(version := _version(connection)):
            for statement in (*statements, f"PRAGMA user_version = {version + 1}"):
                connection.execute(statement)
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return version


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def damaged(error: sqlite3.Error) -> bool:
    """Whether `error` says that the file is not a sound database."""
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGED


def move_aside(path: Path) -> None:
    """Renames the catalog and its side files; the one set aside before is replaced."""
    aside = path.with_suffix(".broken")
    os.replace(path, aside)
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")

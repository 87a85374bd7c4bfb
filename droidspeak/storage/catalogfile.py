"""The catalog's SQLite file: its tables, how it is opened, and what is done when it is damaged."""

from __future__ import annotations

import os
import sqlite3
from contextlib import ExitStack, closing, suppress
from pathlib import Path

__all__ = ["SCHEMA", "damaged", "move_aside", "open_catalog", "open_read_only", "usable"]

VERSION = 1
_BUSY_SECONDS = 10.0
_PRAGMAS = (
    "synchronous = NORMAL",
    "journal_mode = WAL",
    "cache_size = -16384",  # KiB
    "journal_size_limit = 67108864",
)
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

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
        used INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID""",
    "CREATE INDEX eviction ON chunks (queue, place) WHERE pinned = 0",
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
    """A connection that writes nothing. Raises `sqlite3.Error` if there is no catalog of this version."""
    # With no WAL beside it the file is whole, and `immutable` spares SQLite its side files.
    live = Path(f"{path}-wal").exists()
    for options in ("mode=ro", "mode=ro&immutable=1") if live else ("mode=ro&immutable=1",):
        uri = f"{path.absolute().as_uri()}?{options}"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        with ExitStack() as undo, suppress(sqlite3.OperationalError):
            undo.callback(connection.close)
            if _version(connection) == VERSION:
                undo.pop_all()
                return connection
    raise sqlite3.OperationalError("no catalog of this version; open the folder once for writing")


def usable(path: Path) -> bool:
    """Whether there is a catalog; one that cannot be used is moved aside."""
    if not path.exists():
        return False
    try:
        with closing(open_catalog(path)) as connection:
            version = _version(connection)
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if not damaged(error):
            raise
        version, tables = -1, 1
    if version != VERSION and tables:
        move_aside(path)
    return version == VERSION


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

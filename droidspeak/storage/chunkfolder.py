"""A disk tier's folder: which file belongs to which key, and who is at work in it. Knows no tensors.

A file is written with one gathered write.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from droidspeak.errors import StorageError, TierUnavailable
from droidspeak.storage.keys import ChunkKey, SourceId

__all__ = [
    "IOV_MAX",
    "ChunkFolder",
    "WriterMark",
    "locked_folder",
    "named",
    "opened",
    "rest_of",
    "write_file",
]

IOV_MAX = os.sysconf("SC_IOV_MAX")
_QUARANTINED = 16
_TEMP = re.compile(r"\.[0-9a-f]{64}\.([0-9]+-[0-9a-f]+)\.[0-9]+\.tmp")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Makes the system's errors inside a `TierUnavailable` that names `path`, in one line."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise TierUnavailable(f"{path}: {error.strerror or error}") from error


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of `path` for reading."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_file(path: Path, buffers: Sequence[memoryview]) -> None:
    """Writes a new file, and its folder if that is missing. Raises `OSError`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o666)
    try:
        pending = rest_of(buffers, 0)
        while pending:
            pending = rest_of(pending, os.writev(descriptor, pending[:IOV_MAX]))
    finally:
        os.close(descriptor)


def rest_of(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of `buffers` when `done` bytes are done; never begins with an empty buffer."""
    for index, buffer in enumerate(buffers):
        if done < buffer.nbytes:
            return [buffer[done:], *buffers[index + 1 :]]
        done -= buffer.nbytes
    return []


class ChunkFolder:
    """The layout below a tier's root: which file belongs to which key."""

    def __init__(self, root: Path) -> None:
        self._chunks = root / "chunks"
        self._quarantine = root / "quarantine"

    def path(self, key: ChunkKey) -> Path:
        """Where the file of `key` is, or would be."""
        prefix = key.prefix
        return self._chunks / key.source / key.shard / prefix[:2] / prefix[2:4] / f"{prefix}.safetensors"

    def temp(self, key: ChunkKey, writer: str, serial: int) -> Path:
        """Where `writer` fills its `serial`-th file, beside its final place."""
        return self.path(key).with_name(f".{key.prefix}.{writer}.{serial}.tmp")

    def files(self) -> Iterator[Path]:
        """All files, in no order."""
        for folder, _, names in os.walk(self._chunks):
            yield from (Path(folder, name) for name in names)

    def key_at(self, path: Path) -> ChunkKey | None:
        """The key whose file is at `path`, if it is one's."""
        with suppress(ValueError):
            source, shard, *_ = path.relative_to(self._chunks).parts
            key = ChunkKey(SourceId(source), shard, path.stem)
            return key if path == self.path(key) else None
        return None

    @staticmethod
    def writer_at(path: Path) -> str | None:
        """The writer whose temp file is at `path`, if it is one's."""
        temp = _TEMP.fullmatch(path.name)
        return temp[1] if temp else None

    def quarantine(self, path: Path, label: str) -> None:
        """Moves the file out of sight; the newest 16 of such files are kept."""
        self._quarantine.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            os.replace(path, self._quarantine / f"{time.time_ns()}-{label}.safetensors")
        for old in sorted(self._quarantine.iterdir())[:-_QUARANTINED]:
            old.unlink(missing_ok=True)


class WriterMark:
    """A file that a process keeps locked for as long as it has a folder open for writing.

    The kernel drops the lock when the process dies, in whatever way and in whatever container. Marks
    are made and judged inside catalog transactions, so none is seen between its making and its lock.
    """

    def __init__(self, folder: Path) -> None:
        self.writer = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._path = folder / self.writer
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        """Takes the mark away."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    @staticmethod
    def alive(folder: Path, writer: str) -> bool:
        """Whether the process of `writer` still has the folder open."""
        try:
            with opened(folder / writer) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """One process at a time, over all processes."""
    with opened(folder) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield

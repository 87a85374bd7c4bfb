"""Chunk files: where they lie, how they are written and read, and who is at work in their folder.

A file is written with one gathered write and read range by range, each range checked while it is hot.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from droidspeak.errors import ChunkCorrupt, StorageError, TierUnavailable
from droidspeak.storage.container import Chunk, ChunkHeader, Slot, SlotRecord, coalesce, place
from droidspeak.storage.keys import ChunkKey, SourceId

__all__ = [
    "ChunkFolder",
    "HeaderCache",
    "WriterMark",
    "locked_folder",
    "named",
    "opened",
    "read_header",
    "read_slots",
    "write_file",
]

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_QUARANTINED = 16
_WORTH_HELP = 4
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
        pending = _after(buffers, 0)
        while pending:
            pending = _after(pending, os.writev(descriptor, pending[:_IOV_MAX]))
    finally:
        os.close(descriptor)


def read_header(descriptor: int, key: ChunkKey, guess: int) -> ChunkHeader:
    """The header of `key`, checked against the file's length.

    Args:
        guess: bytes of the header; one request if it is right or too large, two if not.

    Raises:
        ChunkCorrupt: the file is not that chunk.
    """
    data = os.pread(descriptor, guess, 0)
    length = ChunkHeader.length(data)
    if len(data) < length:
        data += os.pread(descriptor, length - len(data), len(data))
    return ChunkHeader.parse(data[:length]).expect(key, os.fstat(descriptor).st_size)


def read_slots(
    descriptor: int,
    header: ChunkHeader,
    records: Sequence[SlotRecord],
    into: Mapping[Slot, torch.Tensor] | None,
    best_read: int,
    helper: Executor,
) -> Chunk:
    """The chunk with exactly `records`, one scattered read per range of up to `best_read` bytes.

    Args:
        helper: takes every other range of a long read, if it has a thread to spare.

    Raises:
        ChunkCorrupt: bytes are missing or differ from their checksum.
    """
    groups = deque(coalesce(records, best_read))
    payload: dict[Slot, torch.Tensor] = {}

    def drain() -> None:
        while group := _next(groups):
            payload.update(_read_group(descriptor, header, group, into))

    helped = _submitted(helper, drain) if len(groups) >= _WORTH_HELP else None
    try:
        drain()
    finally:
        groups.clear()
        # The helper must be done with this memory and this descriptor before anybody else is.
        if helped and not helped.cancel():
            helped.result()
    return Chunk(header, payload)


def _submitted(helper: Executor, work: Callable[[], None]) -> Future[None] | None:
    # A tier that is being closed, or a system out of threads, has no help to give.
    with suppress(RuntimeError):
        return helper.submit(work)
    return None


def _next(groups: deque[list[SlotRecord]]) -> list[SlotRecord] | None:
    try:
        return groups.popleft()
    except IndexError:
        return None


def _read_group(
    descriptor: int,
    header: ChunkHeader,
    group: list[SlotRecord],
    into: Mapping[Slot, torch.Tensor] | None,
) -> dict[Slot, torch.Tensor]:
    placed = place(group, into)
    buffers = [placed[record.slot].numpy().data for record in group]
    _read_into(descriptor, buffers, header.data_start + group[0].start, header.key)
    # The bytes are still in the processor's cache: now the checksum costs no memory traffic.
    for record, buffer in zip(group, buffers, strict=True):
        header.check(record, buffer)
    return placed


def _read_into(descriptor: int, buffers: list[memoryview], offset: int, key: ChunkKey) -> None:
    pending = _after(buffers, 0)
    while pending:
        done = os.preadv(descriptor, pending[:_IOV_MAX], offset)
        if done == 0:
            raise ChunkCorrupt(f"chunk {key}: the file ends at byte {offset}")
        pending, offset = _after(pending, done), offset + done


def _after(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
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


class HeaderCache:
    """Parsed headers of the files read last. A file that was replaced or changed is read again."""

    def __init__(self, size: int = 512) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._headers: OrderedDict[tuple[ChunkKey, int, int, int], ChunkHeader] = OrderedDict()

    def get(self, descriptor: int, key: ChunkKey, guess: int) -> ChunkHeader:
        """As `read_header`, without a request if the very same file was read before."""
        status = os.fstat(descriptor)
        identity = (key, status.st_ino, status.st_mtime_ns, status.st_size)
        with self._lock:
            if header := self._headers.get(identity):
                self._headers.move_to_end(identity)
                return header
        header = read_header(descriptor, key, guess)
        with self._lock:
            self._headers[identity] = header
            if len(self._headers) > self._size:
                self._headers.popitem(last=False)
        return header


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

"""The disk tier: one file per chunk, and a catalog over them.

    root/chunks/<source>/<shard>/<pp>/<pp>/<prefix>.safetensors    pp: the prefix's first two bytes
    root/catalog.sqlite        index, see `droidspeak.storage.catalog`; made anew from the files if lost
    root/writers/              one locked file per process that has the folder open for writing
    root/quarantine/           the newest corrupt files
    root/reports/NAME.json     what the engines that use it tell of themselves (`droidspeak.storage.reports`)

Life of a write:

    reserve    one transaction: the intent is noted, victims leave, and the room is this write's
    fill       the temp file beside its final place gets all bytes in one gathered write
    publish    one transaction: rename, row, intent dropped

Files get and lose their names only inside a transaction of the catalog, so processes that share the
folder see one order of events, and the capacity holds over all of them. A process that is killed
leaves at most its intents; whoever opens the folder next finds its `writers/` file unlocked and
settles them. The folder must be on a local file system: SQLite's WAL and `flock` are of one host.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    StorageError,
    TierClosed,
    TierFull,
    TierUnavailable,
)
from droidspeak.storage.catalog import Catalog, PendingWrite
from droidspeak.storage.chunkfolder import (
    ChunkFolder,
    WriterMark,
    locked_folder,
    named,
    opened,
    write_file,
)
from droidspeak.storage.eviction import EvictionPolicy, get_eviction
from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.reports import ReportFolder
from droidspeak.storage.selection import Selection
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, SlotBytes, Tier, TierUsage

if TYPE_CHECKING:
    import torch

    from droidspeak.storage.chunkfile import ChunkReader
    from droidspeak.storage.container import Chunk, Slot
    from droidspeak.storage.reports import Fold

__all__ = ["DiskTier"]

_HEADER_GUESS = 16 << 10
_TOUCHES_HELD = 256
_TOUCH_SECONDS = 5.0
_CROWD_SECONDS = 5.0
_CROWD_POLL_SECONDS = 0.002


class _Crowded(TierFull):
    """No room at this moment: it is taken by writes that are under way."""


class DiskTier(Tier):
    """Chunks in a folder. Several processes may use one folder at once; each opens it after it is forked.

    Nothing is synced: after a power loss a torn file is caught by its checksums, and files whose rows
    were lost are found again by `rebuild`. Uses are noted in memory and reach the catalog within
    `_TOUCH_SECONDS` of traffic, before an eviction and on `close`; the uses of a chunk within that
    time count as one, so a layer-by-layer load is one use.

    Args:
        root: the folder; made if missing.
        capacity: bytes of all chunk files; `None` leaves only the floor below.
        min_free: bytes of the file system that stay free.
        eviction: a policy or the name of one.
        read_only: opens what is there and writes nothing, for a read-only medium.

    Raises:
        TierUnavailable: the folder cannot be made, read or written; the message names it.
    """

    # A range that has just been read is still in the core's second-level cache when it is checked.
    best_read = 2 << 20

    def __init__(
        self,
        root: Path,
        *,
        capacity: int | None = None,
        min_free: int = 1 << 30,
        eviction: EvictionPolicy | str = "lru",
        read_only: bool = False,
        name: str = "disk",
    ) -> None:
        self.name = name
        self.root = Path(root)
        self._folder = ChunkFolder(self.root)
        self._reports = ReportFolder(self.root)
        self._writers = self.root / "writers"
        self.read_only = read_only
        self._capacity = capacity
        self._min_free = min_free
        self._policy = get_eviction(eviction) if isinstance(eviction, str) else eviction
        self._evicted = TierUsage(0, 0)
        self._touched: dict[ChunkKey, int] = {}
        self._touching = threading.Lock()
        self._flushed = time.monotonic()
        self._serial = count()
        self._under_way: set[str] = set()
        self._mark: WriterMark | None = None
        if read_only:
            self._catalog = Catalog(self.root / "catalog.sqlite", read_only=True)
        else:
            self._open()

    @cached_property
    def _reader(self) -> ChunkReader:
        # Who asks only what is there needs no tensors, and not the seconds that torch takes.
        from droidspeak.storage.chunkfile import ChunkReader

        return ChunkReader(self.name)

    def path(self, key: ChunkKey) -> Path:
        """Where the file of `key` is, or would be."""
        return self._folder.path(key)

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        row = self._catalog.find(key)
        return row.info if row else None

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        return self._catalog.leading(keys)

    def keys(self) -> Iterator[ChunkKey]:
        return self._catalog.keys()

    def records(self) -> Iterator[ChunkRecord]:
        return self.select(Selection())

    def select(self, selection: Selection) -> Iterator[ChunkRecord]:
        return self._catalog.select(selection, self.name)

    def slot_bytes(self) -> dict[SourceId, SlotBytes]:
        return self._catalog.slot_bytes()

    def usage(self) -> TierUsage:
        held = self._catalog.usage()
        return TierUsage(held.chunks, held.nbytes, self._capacity, held.pinned)

    def sources(self) -> dict[SourceId, TierUsage]:
        """Chunks and bytes per source model; costs the same however many chunks there are."""
        return self._catalog.sources()

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        row = self._catalog.find(key)
        if row is None:
            return None
        path = self.path(key)
        with named(path):
            try:
                chunk = self._reader.read(path, key, row.header_bytes, slots, into, self.best_read)
            except FileNotFoundError:
                self._forget(key)
                return None
        self._touch(key)
        return chunk

    def _forget(self, key: ChunkKey) -> None:
        if self.read_only:
            return
        # The answer is a miss, also when that cannot be noted.
        with suppress(TierUnavailable), self._catalog.transaction():
            # Another process may have written it since; under the transaction nobody can.
            if not self.path(key).exists():
                self._catalog.remove(key)

    def _touch(self, key: ChunkKey) -> None:
        if self.read_only:
            return
        with self._touching:
            self._touched.pop(key, None)
            self._touched[key] = time.time_ns()
            late = time.monotonic() - self._flushed > _TOUCH_SECONDS
            due = late or len(self._touched) >= _TOUCHES_HELD
        if due:
            # The read has succeeded; that its use could not be noted is no failure of it.
            with suppress(TierUnavailable):
                self.flush()

    def flush(self) -> None:
        """Brings the uses noted so far into the catalog."""
        if self._touched:
            with self._catalog.transaction():
                self._apply_touches()

    def _apply_touches(self) -> None:
        with self._touching:
            touched, self._touched = self._touched, {}
            self._flushed = time.monotonic()
        for key, used in touched.items():
            self._policy.touch(self._catalog, key)
            self._catalog.set_used(key, used)

    def write(self, chunk: Chunk) -> None:
        mark = self._writable()
        if not chunk.complete:
            raise ChunkIncomplete(f"chunk {chunk.key} has {len(chunk.payload)} of its slots")
        temp = self._folder.temp(chunk.key, mark.writer, next(self._serial)).relative_to(self.root)
        write = PendingWrite(str(temp), chunk.key, chunk.header.nbytes, mark.writer)
        self._under_way.add(write.temp)
        try:
            with named(self.path(chunk.key)):
                self._reserve(write)
                self._fill(write, chunk)
        finally:
            self._under_way.discard(write.temp)

    def _reserve(self, write: PendingWrite) -> None:
        if self._capacity is not None and write.nbytes > self._capacity:
            raise TierFull(f"{self.name}: a chunk of {write.nbytes} bytes, the capacity is {self._capacity}")
        patience = time.monotonic() + _CROWD_SECONDS
        while True:
            try:
                with self._catalog.transaction():
                    self._catalog.begin_write(write)
                    return self._make_room(write.nbytes)
            except _Crowded:
                # What others are writing now can be evicted as soon as it is there.
                if time.monotonic() > patience:
                    raise
            time.sleep(_CROWD_POLL_SECONDS)

    def _make_room(self, size: int) -> None:
        if self._shortage(size, 0) <= 0:
            return
        self._settle()
        victims, freed = self._choose_victims(lambda freed: self._shortage(size, freed) > 0)
        if self._shortage(size, freed) > 0:
            crowded = len(self._catalog.writes()) > 1
            raise (_Crowded if crowded else TierFull)(self._why_full(size))
        # Files leave last: when the room cannot be made, nobody has left for nothing.
        self._unlink(victims)
        self._evicted = self._evicted.plus(len(victims), freed)

    def _choose_victims(self, short: Callable[[int], bool]) -> tuple[list[ChunkKey], int]:
        """Takes rows out while `short` of the bytes freed so far; whose files must leave, and the bytes."""
        self._apply_touches()
        victims: list[ChunkKey] = []
        freed = 0
        while short(freed) and (victim := self._policy.victim(self._catalog)):
            self._catalog.remove(victim.key)
            victims.append(victim.key)
            freed += victim.nbytes
        return victims, freed

    def _unlink(self, keys: list[ChunkKey]) -> None:
        for key in keys:
            self.path(key).unlink(missing_ok=True)

    def _shortage(self, size: int, freed: int) -> int:
        floor = size + self._min_free - shutil.disk_usage(self.root).free - freed
        if self._capacity is None:
            return floor
        return max(floor, self._catalog.committed() - self._capacity)

    def _why_full(self, size: int) -> str:
        free = shutil.disk_usage(self.root).free
        return (
            f"{self.name}: no room for a chunk of {size} bytes in {self.root}: of the capacity of"
            f" {self._capacity} bytes {self._catalog.committed() - size} are pinned or being written;"
            f" {free} bytes are free, {self._min_free} stay free"
        )

    def _fill(self, write: PendingWrite, chunk: Chunk) -> None:
        try:
            write_file(self.root / write.temp, chunk.buffers())
            self._publish(write, ChunkInfo.of(chunk), chunk.header.data_start)
        except BaseException:
            self._abandon(write)
            raise

    def _publish(self, write: PendingWrite, info: ChunkInfo, header_bytes: int) -> None:
        with self._catalog.transaction():
            os.replace(self.root / write.temp, self.path(write.key))
            self._record(info, header_bytes, time.time_ns())
            self._catalog.end_write(write)

    def _record(self, info: ChunkInfo, header_bytes: int, created: int) -> None:
        before = self._catalog.get(info.key)
        self._policy.admit(self._catalog, info.key, info.nbytes)
        self._catalog.describe(info, header_bytes, created)
        if before and before.pinned:
            self._catalog.set_pinned(info.key, True)

    def _abandon(self, write: PendingWrite) -> None:
        with suppress(OSError):
            (self.root / write.temp).unlink(missing_ok=True)
        # If the catalog cannot be written now (a full disk), a later `_settle` does it.
        with suppress(OSError, StorageError), self._catalog.transaction():
            self._settle_write(write)

    def delete(self, key: ChunkKey) -> bool:
        self._writable()
        with self._catalog.transaction(), named(self.path(key)):
            self.path(key).unlink(missing_ok=True)
            return self._catalog.remove(key)

    def delete_unused(self, records: Sequence[ChunkRecord]) -> list[ChunkRecord]:
        with self.exclusively() as catalog:
            left = [record for record in records if catalog.is_as(record)]
            for record in left:
                catalog.remove(record.info.key)
            self._unlink([record.info.key for record in left])
        return left

    def evict(self, nbytes: int) -> int:
        if self.read_only:
            return 0
        self._writable()
        with self._catalog.transaction(), named(self.root):
            victims, freed = self._choose_victims(lambda freed: freed < nbytes)
            self._unlink(victims)
            self._evicted = self._evicted.plus(len(victims), freed)
        return freed

    def evicted(self) -> TierUsage:
        return self._evicted

    def pin(self, key: ChunkKey) -> bool:
        return self._set_pinned(key, True)

    def unpin(self, key: ChunkKey) -> bool:
        return self._set_pinned(key, False)

    def _set_pinned(self, key: ChunkKey, pinned: bool) -> bool:
        if self.read_only:
            return self.head(key) is not None
        with self._catalog.transaction():
            return self._catalog.set_pinned(key, pinned)

    def quarantine(self, key: ChunkKey) -> None:
        """Moves the file to `root/quarantine`, which keeps the newest ones."""
        self._writable()
        with self._catalog.transaction(), named(self.root / "quarantine"):
            self._catalog.remove(key)
            self._folder.quarantine(self.path(key), str(key).replace("/", "-"))

    @contextmanager
    def exclusively(self) -> Iterator[Catalog]:
        """The catalog, while no other process can change it or the files. What is done inside is kept, or
        none of it."""
        self._writable()
        with self._catalog.transaction(), named(self.root):
            self._apply_touches()
            yield self._catalog

    def put_report(self, name: str, data: bytes) -> bool:
        if self.read_only:
            return False
        self._writable()
        self._reports.put(name, data)
        return True

    def reports(self) -> Iterator[tuple[str, bytes]]:
        return self._reports.all()

    def fold_reports(self, fold: Fold) -> None:
        if not self.read_only:
            self._reports.fold(fold)

    def rebuild(self) -> TierUsage:
        """Makes the catalog anew from the files and says what they are.

        Every header is read; payloads are not. Files that are no sound chunk are quarantined, pins and
        the order of use are kept. Other processes' writes wait for it and may time out.
        """
        self._writable()
        with self._catalog.transaction():
            self._scan()
        return self.usage()

    def close(self) -> None:
        if self._mark:
            with suppress(TierUnavailable):
                self.flush()
            self._mark.release()
            self._mark = None
        self._catalog.close()
        if "_reader" in self.__dict__:
            self._reader.close()

    def _writable(self) -> WriterMark:
        if self._mark is None:
            if self.read_only:
                raise TierUnavailable(f"{self.root}: the tier is opened read-only")
            raise TierClosed(f"{self.root}: the tier is closed")
        return self._mark

    def _open(self) -> None:
        with named(self.root), ExitStack() as undo:
            self._writers.mkdir(parents=True, exist_ok=True)
            with locked_folder(self.root):
                self._catalog = Catalog(self.root / "catalog.sqlite")
                undo.callback(self._catalog.close)
                with self._catalog.transaction():
                    if self._catalog.fresh:
                        self._scan()
                    self._settle()
                    self._mark = WriterMark(self._writers)
                    undo.callback(self._mark.release)
            undo.pop_all()

    def _settle(self) -> None:
        """Ends what processes that are gone, and failed writes of this one, have left. In a transaction."""
        for write in self._catalog.writes():
            if self._is_over(write):
                self._settle_write(write)
        for path in self._writers.iterdir():
            if not WriterMark.alive(self._writers, path.name):
                # Its process may be closing at this moment.
                path.unlink(missing_ok=True)

    def _is_over(self, write: PendingWrite) -> bool:
        if self._mark and write.writer == self._mark.writer:
            return write.temp not in self._under_way
        return not WriterMark.alive(self._writers, write.writer)

    def _settle_write(self, write: PendingWrite) -> None:
        temp, final = self.root / write.temp, self.path(write.key)
        if temp.exists():
            temp.unlink()
        elif final.exists():
            self.adopt(write.key)
        self._catalog.end_write(write)

    def _scan(self) -> None:
        with self._catalog.renewed():
            for path in self._folder.files():
                self._sort_in(path)

    def _sort_in(self, path: Path) -> None:
        if writer := self._folder.writer_at(path):
            if not WriterMark.alive(self._writers, writer):
                path.unlink(missing_ok=True)
            return
        key = self._folder.key_at(path)
        if key is None or not self.adopt(key):
            self._folder.quarantine(path, path.stem)

    def adopt(self, key: ChunkKey) -> bool:
        """Inside `exclusively`: records the file of `key` if it is that chunk, by header and length; whether
        it is. A chunk that was recorded before keeps its pin."""
        from droidspeak.storage.chunkfile import read_header

        try:
            with opened(self.path(key)) as file:
                header = read_header(file, key, _HEADER_GUESS)
                created = os.fstat(file).st_mtime_ns
        except (ChunkCorrupt, OSError):
            return False
        self._record(ChunkInfo.of_header(header), header.data_start, created)
        return True

"""Looking for damage in the folder of a disk tier, beside the processes that use it.

The rows of the catalog are gone through and the files that they speak of looked at; then the files, for
those that no row speaks of. What looks wrong is looked at once more while no process can change the
folder: files and rows change together inside transactions of the catalog, so by then they must agree.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from droidspeak.errors import TierUnavailable
from droidspeak.storage.catalog import Catalog, CatalogRow, PendingWrite
from droidspeak.storage.catalogfile import damaged, held_still
from droidspeak.storage.chunkfolder import ChunkFolder, WriterMark
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.spread import spread
from droidspeak.storage.verify import Finding, FindingKind, VerifyCounts, VerifyOptions, differences
from droidspeak.storage.verifyfile import Examiner, FileState, identity_of

__all__ = ["verify_folder"]

# One reads while the other one checks what it has read.
_THREADS = 2
_BATCH = 256

T = TypeVar("T")


def verify_folder(
    root: Path,
    name: str,
    options: VerifyOptions,
    counts: VerifyCounts,
    reopen: Callable[[], DiskTier],
) -> Iterator[Finding]:
    """Findings in the folder of the disk tier called `name`, as they are found and, if asked, repaired.

    Args:
        root: need not be open; nothing in it is written unless it is repaired.
        reopen: opens the tier for writing; called only to repair.

    Raises:
        TierUnavailable: the folder cannot be read, or not be repaired.
    """
    with ExitStack() as stack:
        if finding := _catalog_fault(root, name):
            yield replace(finding, repair="rebuilt") if options.repair else finding
            if not options.repair:
                return
            stack.enter_context(reopen()).rebuild()
        look = stack.enter_context(_FolderLook(root, name, options, counts))
        yield from filter(look.wanted, look.leftovers())
        if options.repair:
            look.repair_with(stack.enter_context(reopen()))
        yield from look.chunks()


def _catalog_fault(root: Path, name: str) -> Finding | None:
    path = root / "catalog.sqlite"
    try:
        Catalog(path, read_only=True).close()
    except TierUnavailable as error:
        if not root.is_dir() or (path.exists() and not _is_unusable(error)):
            raise
        size = path.stat().st_size if path.exists() else 0
        detail = "missing, damaged or of another version; it can be made anew from the files"
        return Finding(name, FindingKind.STALE_INDEX, None, path.name, size, detail)
    return None


def _is_unusable(error: TierUnavailable) -> bool:
    """Whether it is the catalog itself that is wrong, and not that it cannot be read now."""
    cause = error.__cause__
    return isinstance(cause, sqlite3.Error) and (damaged(cause) or "no catalog" in str(cause))


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A key whose row or file (`state`; `None`: it is not there) does not look right."""

    key: ChunkKey
    state: FileState | None


class _FolderLook:
    """One look at a folder."""

    def __init__(self, root: Path, name: str, options: VerifyOptions, counts: VerifyCounts) -> None:
        self._root, self._name, self._options, self._counts = root, name, options, counts
        self._writers = root / "writers"
        self._folder = ChunkFolder(root)
        self._examiner = Examiner()
        self._chosen = options.chooser()
        self._tier: DiskTier | None = None
        self._reported: set[str] = set()
        self._unfinished: set[ChunkKey] = set()
        self._open = ExitStack()

    def __enter__(self) -> _FolderLook:
        with ExitStack() as undo:
            # First: SQLite reads a catalog that somebody else has open as one that may change.
            self._still = undo.enter_context(held_still(self._root / "catalog.sqlite"))
            self._catalog = Catalog(self._root / "catalog.sqlite", read_only=True)
            undo.callback(self._catalog.close)
            self._open = undo.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    def repair_with(self, tier: DiskTier) -> None:
        """Whatever is found from now on is repaired. Opening `tier` has settled what writers had left."""
        self._tier = tier
        self._unfinished.clear()

    def wanted(self, finding: Finding) -> bool:
        """Whether it is of a kind that is looked for."""
        return self._looks_for(finding.kind)

    def _looks_for(self, kind: FindingKind) -> bool:
        return self._options.kinds is None or kind in self._options.kinds

    @contextmanager
    def _quiet(self) -> Iterator[Catalog | None]:
        """While nobody changes the folder; with the catalog to change, if it is to be repaired."""
        if self._tier:
            with self._tier.exclusively() as catalog:
                yield catalog
        else:
            with self._still():
                yield None

    # What killed writers have left

    def leftovers(self) -> Iterator[Finding]:
        """Writes that were begun and will never end."""
        with self._quiet():
            over = [write for write in self._catalog.writes() if not self._alive(write.writer)]
            found = [self._leftover(write) for write in over]
        self._reported = {write.temp for write in over}
        self._unfinished = {write.key for write in over}
        yield from found

    def _leftover(self, write: PendingWrite) -> Finding:
        identity = identity_of(self._root / write.temp)
        repair = ("removed" if identity else "settled") if self._options.repair else None
        detail = f"a write that process {write.writer.partition('-')[0]} did not end"
        nbytes = identity[2] if identity else 0
        return Finding(self._name, FindingKind.LEFTOVER, write.key, write.temp, nbytes, detail, repair)

    def _alive(self, writer: str) -> bool:
        return WriterMark.alive(self._writers, writer)

    # Chunks

    def chunks(self) -> Iterator[Finding]:
        """What is wrong with rows and files."""
        for suspect in self._suspects():
            if finding := self._confirmed(suspect):
                yield finding
        for path in self._strange_files():
            if finding := self._strange(path):
                yield finding

    def _suspects(self) -> Iterator[_Suspect]:
        for looked in (
            spread(self._look_at_row, self._rows(), _THREADS),
            spread(self._look_at_file, self._files_without_row(), _THREADS),
        ):
            for suspect, read in looked:
                if read:
                    self._counts.add(read)
                if suspect:
                    yield suspect

    def _rows(self) -> Iterator[CatalogRow]:
        for keys in _batched(filter(self._chosen, self._catalog.keys()), _BATCH):
            yield from self._catalog.rows(keys).values()

    def _look_at_row(self, row: CatalogRow) -> tuple[_Suspect | None, int]:
        key = row.info.key
        state = self._examiner.examine(self._folder.path(key), key, self._options.full)
        suspect = _Suspect(key, state) if _wrong(row, state) else None
        return suspect, state.read if state else 0

    def _files_without_row(self) -> Iterator[ChunkKey]:
        keys = (key for path in self._folder.files() if (key := self._folder.key_at(path)))
        for batch in _batched(filter(self._chosen, keys), _BATCH):
            rows = self._catalog.rows(batch)
            yield from (key for key in batch if key not in rows)

    def _look_at_file(self, key: ChunkKey) -> tuple[_Suspect | None, int]:
        # What is to be adopted is read to its end.
        full = self._options.full or (self._options.repair and self._options.adopt)
        state = self._examiner.examine(self._folder.path(key), key, full)
        return (_Suspect(key, state), state.read) if state else (None, 0)

    def _confirmed(self, suspect: _Suspect) -> Finding | None:
        key, state = suspect.key, suspect.state
        if key in self._unfinished:
            return None
        path = self._folder.path(key)
        with self._quiet() as catalog:
            row = self._catalog.rows([key]).get(key)
            if identity_of(path) != (state.identity if state else None):
                # Replaced, evicted or written since.
                state = self._examiner.examine(path, key, state is not None and state.full)
            wrong = _wrong(row, state)
            if wrong is None or not self._looks_for(wrong[0]):
                return None
            kind, detail = wrong
            repair = self._repair(kind, key, catalog) if catalog else None
        place, nbytes = str(path.relative_to(self._root)), state.identity[2] if state else 0
        return Finding(self._name, kind, key, place, nbytes, detail, repair)

    def _repair(self, kind: FindingKind, key: ChunkKey, catalog: Catalog) -> str | None:
        assert self._tier
        if kind is FindingKind.UNREADABLE:
            return None
        if kind is FindingKind.ORPHAN_ROW:
            catalog.remove(key)
            return "removed"
        if kind is FindingKind.ORPHAN_FILE and not self._options.adopt:
            self._folder.path(key).unlink(missing_ok=True)
            return "removed"
        if kind in (FindingKind.ORPHAN_FILE, FindingKind.STALE_INDEX) and self._tier.adopt(key):
            return "adopted" if kind is FindingKind.ORPHAN_FILE else "renewed"
        catalog.remove(key)
        self._folder.quarantine(self._folder.path(key), str(key).replace("/", "-"))
        return "quarantined"

    # Files that are no chunks

    def _strange_files(self) -> Iterator[Path]:
        return (path for path in self._folder.files() if self._folder.key_at(path) is None)

    def _strange(self, path: Path) -> Finding | None:
        writer = self._folder.writer_at(path)
        place = str(path.relative_to(self._root))
        with self._quiet() as catalog:
            kind = FindingKind.LEFTOVER if writer else FindingKind.ORPHAN_FILE
            identity = identity_of(path) if self._looks_for(kind) else None
            if identity is None or place in self._reported or (writer and self._alive(writer)):
                return None
            if catalog and writer:
                path.unlink()
            elif catalog:
                self._folder.quarantine(path, path.stem)
        detail = "a file that was not written to its end" if writer else "not a file of this store"
        repair = ("removed" if writer else "quarantined") if catalog else None
        return Finding(self._name, kind, None, place, identity[2], detail, repair)


def _wrong(row: CatalogRow | None, state: FileState | None) -> tuple[FindingKind, str] | None:
    """What a row and a file have against each other."""
    if state is None:
        return (FindingKind.ORPHAN_ROW, "there is no such file") if row else None
    if state.fault:
        return state.fault, state.detail
    if row is None:
        return FindingKind.ORPHAN_FILE, "the catalog does not know it"
    assert state.header
    wrong = differences(row.info, state.header)
    return (FindingKind.STALE_INDEX, wrong) if wrong else None


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch

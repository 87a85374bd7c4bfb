"""From our store into LMCache's memory objects.

    allocate -> read into it -> compare with what the engine expects -> hand over, or a reason

Most chunks are full, so memory for a full one is there before the read and the bytes land in it. A
shorter chunk is copied once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import torch

from droidspeak.errors import ChunkCorrupt, LoadFailed, StorageError
from droidspeak.integrations.lmcache_plugin.objects import LAYOUT_LABEL, Expected, Layout, lend, tensors
from droidspeak.integrations.lmcache_plugin.tally import Tally, reason_of
from droidspeak.storage import Chunk, ChunkKey, Slot, TieredStore
from droidspeak.storage.objects import object_slot, object_slots

__all__ = ["Allocate", "Loading", "give_back"]

Allocate = Callable[[Layout], Any]


class Loading:
    """The loads of one engine.

    Args:
        expected: the layouts that the engine can use.
    """

    def __init__(self, store: TieredStore, tally: Tally, expected: Expected) -> None:
        self._store, self._tally, self._expected = store, tally, expected

    def fetch(self, chunk: ChunkKey, layers: Sequence[int] | None, allocate: Allocate) -> list[Any]:
        """The memory objects of some layers of a chunk, or the one of all layers (`None`).

        Args:
            allocate: a memory object of a layout with one reference, or `None`.

        Returns:
            Objects with one reference each for the caller.

        Raises:
            LoadFailed: with the reason; nothing is kept, and it is not counted.
        """
        try:
            objects = self._fetch(chunk, layers, allocate)
        except LoadFailed as error:
            reason, message = error.reason, str(error)
        else:
            self._tally.done("hits", len(objects))
            return objects
        # Raised where no frame knows the memory: a traceback would keep it.
        raise LoadFailed(reason, message)

    def _fetch(self, chunk: ChunkKey, layers: Sequence[int] | None, allocate: Allocate) -> list[Any]:
        guess = _one_by_one(self._expected.full(layered=layers is not None), layers)
        with _Targets(guess, layers, allocate) as targets:
            read = self._read(chunk, layers, targets.into)
            layouts = _one_by_one(self._layout(read, layered=layers is not None), layers)
            if layouts == guess:
                return targets.filled(read)
        with _Targets(layouts, layers, allocate) as targets:
            return targets.filled(read)

    def _read(
        self, chunk: ChunkKey, layers: Sequence[int] | None, into: Mapping[Slot, torch.Tensor]
    ) -> Chunk:
        slots = None if layers is None else object_slots(layers)
        try:
            read = self._store.read(chunk, slots, into)
        except StorageError as error:
            raise LoadFailed(reason_of(error), str(error)) from None
        if read is None:
            raise LoadFailed("absent", f"chunk {chunk} is not in the store")
        return read

    def _layout(self, read: Chunk, *, layered: bool) -> Layout:
        fault: str | None = "not what its label says"
        with suppress(KeyError, ValueError):
            layout = Layout.parse(read.header.labels[LAYOUT_LABEL])
            if layout.describes(read.header.records):
                fault = self._expected.fault(layout, layered=layered)
        if fault is None:
            return layout
        # The key says that it is this engine's: whatever it is, nobody can use it.
        with suppress(StorageError):
            self._store.quarantine(read.header.key)
        raise LoadFailed("foreign", f"chunk {read.header.key} is {fault}")


class _Targets:
    """Memory objects to fill. Inside `with` they are ours: what `filled` has not given away, goes back.

    Attributes:
        into: tensors over their memory, by slot.
    """

    def __init__(self, layouts: Sequence[Layout], layers: Sequence[int] | None, allocate: Allocate) -> None:
        self._layouts, self._allocate = layouts, allocate
        self._slots = range(len(layouts[0].parts)) if layers is None else layers
        self._objects: list[Any] = []
        self.into: dict[Slot, torch.Tensor] = {}

    def __enter__(self) -> Self:
        try:
            for layout in self._layouts:
                self._add(layout)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.into = {}
        give_back(self._objects)
        self._objects = []

    def filled(self, read: Chunk) -> list[Any]:
        """The objects with all that was read in them; they are the caller's now."""
        for slot, tensor in self.into.items():
            if read.payload[slot].data_ptr() != tensor.data_ptr():
                try:
                    read.tensor(slot, tensor)
                except ChunkCorrupt as error:
                    raise LoadFailed("corrupt", str(error)) from None
        objects, self._objects = self._objects, []
        return objects

    def _add(self, layout: Layout) -> None:
        memory_obj = self._allocate(layout)
        if memory_obj is None:
            raise LoadFailed("no_room", f"no room for {layout.nbytes} bytes in LMCache's buffer")
        self._objects.append(memory_obj)
        free = [object_slot(slot) for slot in self._slots][len(self.into) :]
        # `free` has more slots than this object where each layer is an object.
        self.into.update(zip(free, tensors(lend(memory_obj), layout), strict=False))


def give_back(objects: Iterable[Any]) -> None:
    """Gives one reference of each back to LMCache."""
    for memory_obj in objects:
        memory_obj.ref_count_down()


def _one_by_one(layout: Layout, layers: Sequence[int] | None) -> list[Layout]:
    return [layout] if layers is None else layout.only(layers)

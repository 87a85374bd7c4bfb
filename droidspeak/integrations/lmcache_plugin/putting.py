"""From LMCache's memory objects into our store.

    lend -> (layers: assemble) -> queue -> copy -> write, all layers of a chunk at once

A put returns at once. It keeps a reference of the memory object until its bytes are copied: the store
keeps what it is given, and LMCache uses its buffer again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from droidspeak.errors import StorageError
from droidspeak.integrations.lmcache_plugin.assembly import Assembly
from droidspeak.integrations.lmcache_plugin.objects import LAYOUT_LABEL, Layout, layer_of, lend, tensors
from droidspeak.integrations.lmcache_plugin.tally import Tally, reason_of
from droidspeak.storage import Chunk, ChunkKey, TieredStore
from droidspeak.storage.backlog import Backlog
from droidspeak.storage.objects import NAME_LABEL, object_chunk

__all__ = ["Bounds", "Putting"]

_log = logging.getLogger(__name__)
_CLOSE_TIMEOUT = 60.0
Told = Callable[[], None]


@dataclass(frozen=True)
class Bounds:
    """What puts may keep of LMCache's buffer.

    Attributes:
        queue: bytes of whole chunks that wait to be written.
        assembly: bytes of layers that wait for the rest of their chunk.
        assembly_timeout: seconds after which those are forgotten.
    """

    queue: int
    assembly: int
    assembly_timeout: float


@dataclass(frozen=True)
class _Lent:
    """A memory object that is being stored."""

    view: memoryview
    layout: Layout
    told: Told | None

    @property
    def nbytes(self) -> int:
        return self.view.nbytes


@dataclass(frozen=True)
class _Put:
    """A whole chunk on its way into the store: one object, or one for each layer."""

    key: ChunkKey
    name: str
    layout: Layout
    lent: list[_Lent] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(lent.nbytes for lent in self.lent)


class Putting:
    """The puts of one engine.

    Args:
        layers: of a chunk that comes layer by layer.
        codec: `raw` or `zstd`.
    """

    def __init__(self, store: TieredStore, tally: Tally, codec: str, layers: int, bounds: Bounds) -> None:
        self._store, self._tally, self._codec = store, tally, codec
        self._queue: Backlog[_Put] = Backlog(self._write, bounds.queue, "droidspeak lmcache put")
        self._assembly: Assembly[_Lent] = Assembly(
            layers, bounds.assembly, bounds.assembly_timeout, self._forgotten
        )

    def put(self, chunk: ChunkKey, key: Any, memory_obj: Any, told: Told | None = None) -> None:
        """Begins to store a memory object; `told` is called when its chunk is done with, well or not."""
        self._assembly.sweep()
        layout = Layout.of(memory_obj)
        if layout is None:
            self._tally.failed("not_stored", "unsupported", f"{key.to_string()} is no tensor (remote_serde?)")
            _tell(told)
            return
        lent, layer = _Lent(lend(memory_obj), layout, told), layer_of(key)
        if layer is None:
            self._enqueue(_Put(chunk, key.to_string(), layout, [lent]))
        elif layers := self._assembly.add(chunk, layer, lent):
            self._enqueue_layers(chunk, key.to_string(), layers)

    def under_way(self, chunk: ChunkKey, layer: int | None) -> bool:
        """Whether a put of `chunk`, or of that layer of it, has begun and not ended."""
        waits = layer is not None and self._assembly.holds(chunk, layer)
        return waits or self._queue.get(chunk) is not None

    def among(self, chunks: Iterable[ChunkKey]) -> set[ChunkKey]:
        """Those of `chunks` that are complete and wait to be written."""
        return set(self._queue.among(chunks))

    def settle(self, chunk: ChunkKey, timeout: float) -> bool:
        """Waits until `chunk` is written, if it is complete; whether that came within `timeout` s."""
        return self._queue.settle(chunk, timeout)

    def flush(self, timeout: float) -> bool:
        """Waits until all complete chunks are written; whether that came within `timeout` s."""
        return self._queue.flush(timeout)

    def sweep(self) -> None:
        """Forgets layers whose time is over."""
        self._assembly.sweep()

    def close(self) -> None:
        """Writes what waits, and forgets incomplete chunks."""
        self._assembly.clear()
        if not self._queue.close(_CLOSE_TIMEOUT):
            _log.warning("closed before everything was stored")

    def _enqueue_layers(self, chunk: ChunkKey, name: str, layers: list[_Lent]) -> None:
        layout = Layout.stacked([lent.layout for lent in layers])
        if layout is None:
            self._tally.failed("not_stored", "unsupported", f"{name}: layers of different formats")
            _tell_all(layers)
            return
        self._enqueue(_Put(chunk, name, layout, layers))

    def _enqueue(self, put: _Put) -> None:
        # What is under way is the same: the key says which tokens of which model.
        if self._queue.get(put.key) is not None:
            _tell_all(put.lent)
        elif not self._queue.add(put.key, put, put.nbytes, timeout=0):
            self._tally.failed("not_stored", "no_room", f"{put.name}: the store does not keep up")
            _tell_all(put.lent)

    def _write(self, put: _Put) -> None:
        try:
            if self._store.head(put.key) is None:
                self._store.write(self._chunk(put))
                self._tally.done("stored", len(put.lent))
        except StorageError as error:
            self._tally.failed("not_stored", reason_of(error), str(error))
        finally:
            _tell_all(put.lent)

    def _chunk(self, put: _Put) -> Chunk:
        parts = [part for lent in put.lent for part in tensors(lent.view, lent.layout)]
        if self._codec == "raw":
            parts = [part.clone() for part in parts]
        labels = {NAME_LABEL: put.name, LAYOUT_LABEL: str(put.layout)}
        return object_chunk(put.key, dict(enumerate(parts)), labels=labels, codec=self._codec)

    def _forgotten(self, reason: str, layers: list[_Lent]) -> None:
        self._tally.failed("not_stored", reason, f"only {len(layers)} layers of a chunk came")
        _tell_all(layers)


def _tell_all(lent: Iterable[_Lent]) -> None:
    for one in lent:
        _tell(one.told)


def _tell(told: Told | None) -> None:
    if told is None:
        return
    try:
        told()
    except Exception:  # noqa: BLE001 - LMCache's contract: what its callback raises is logged, no more
        _log.exception("a callback of LMCache failed")

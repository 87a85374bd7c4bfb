"""Saving: a model's own prefill, kept layer by layer.

    put(layer, k, v, e) while the prefill proceeds  ->  a chunk is published when all its rows of all
    its slots have come  ->  finish()

A chunk that misses anything is never published. Saving never fails a request and never holds it: what
the store refuses is counted and forgotten, and so is what it is too slow to take.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from droidspeak.connector.layout import RowLayout
from droidspeak.errors import StorageError
from droidspeak.storage import Chunk, ChunkKey, Counters, Slot, SlotKind, Tier
from droidspeak.tracing import span

__all__ = ["Publisher", "SaveSession"]

_log = logging.getLogger(__name__)


@dataclass
class _Draft:
    """One chunk being filled. `filled` has a bit for each row that has come, `full` the done slots.

    Rows may come twice (a preempted prefill starts over), so counting them would not do.
    """

    key: ChunkKey
    labels: Mapping[str, str] = field(default_factory=dict)
    tensors: dict[Slot, torch.Tensor] = field(default_factory=dict)
    filled: dict[Slot, int] = field(default_factory=dict)
    full: set[Slot] = field(default_factory=set)

    def take(self, slot: Slot, rows: torch.Tensor, at: int, size: int) -> None:
        """Copies `rows` to row `at` of the slot's `size` rows."""
        if slot not in self.tensors:
            self.tensors[slot] = torch.empty((size, *rows.shape[1:]), dtype=rows.dtype)
        end = at + rows.shape[0]
        self.tensors[slot][at:end].copy_(rows)
        self.filled[slot] = self.filled.get(slot, 0) | (1 << end) - (1 << at)
        if self.filled[slot] == (1 << size) - 1:
            self.full.add(slot)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Publisher:
    """One thread that codes and writes finished chunks.

    Args:
        backlog: bytes that may wait or be written. One chunk is always accepted, however large.
        counters: gets `chunks_saved`, `save_failures`, and `chunks_dropped` (there was no room).
    """

    def __init__(self, store: Tier, codec: str, backlog: int, counters: Counters) -> None:
        self._store, self._codec, self._backlog, self._counters = store, codec, backlog, counters
        self._thread = ThreadPoolExecutor(1, "droidspeak-save")
        self._lock = threading.Lock()
        self._nbytes = 0
        self._closed = False

    def publish(self, draft: _Draft) -> Future[bool] | None:
        """Queues a full draft, which must not change any more; `None` if it is dropped instead."""
        with self._lock:
            over = self._nbytes > 0 and self._nbytes + draft.nbytes > self._backlog
            if over or self._closed:
                self._counters.add("chunks_dropped")
                return None
            self._nbytes += draft.nbytes
            return self._thread.submit(self._publish, draft)

    @property
    def nbytes(self) -> int:
        """Bytes that wait or are being written."""
        return self._nbytes

    def flush(self) -> None:
        """Waits until everything queued so far has been handed to the store, or refused by it."""
        with self._lock:
            last = None if self._closed else self._thread.submit(lambda: None)
        if last is not None:
            last.result()

    def close(self) -> None:
        """Flushes, and drops whatever comes later. Calling it twice is fine."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait=True)

    def _publish(self, draft: _Draft) -> bool:
        with span("droidspeak.save", {"droidspeak.bytes": draft.nbytes}) as traced:
            saved = self._write(draft)
            if not saved:
                traced.fail("not saved")
        return saved

    def _write(self, draft: _Draft) -> bool:
        try:
            self._store.write(Chunk.encode(draft.key, draft.tensors, codec=self._codec, labels=draft.labels))
        except StorageError as error:
            _log.debug("chunk %s not saved: %s", draft.key, error)
        except BaseException:  # noqa: BLE001 - saving never fails a request, whatever a tier of the user raises
            _log.exception("chunk %s not saved", draft.key)
        else:
            self._counters.add("chunks_saved")
            return True
        finally:
            with self._lock:
                self._nbytes -= draft.nbytes
        self._counters.add("save_failures")
        return False


class SaveSession:
    """Collects K, V and E of one prompt's full chunks. For one thread.

    Args:
        keys: of the chunks, in order; `None` where the store has the chunk already.
        layout: of the model; `None` if there is nothing to save.
        e_layers: layers whose E is kept.
        salt: tag of the tenant's salt, kept with each chunk (`droidspeak.storage.keys.salt_tag`).

    Attributes:
        e_layers: layers whose E `put` wants; none if there is nothing to save.
    """

    def __init__(
        self,
        keys: Sequence[ChunkKey | None],
        *,
        chunk_size: int,
        layout: RowLayout | None,
        e_layers: Collection[int],
        publish: Callable[[_Draft], Future[bool] | None],
        counters: Counters,
        salt: str = "",
    ) -> None:
        self._labels = {"salt": salt} if salt else {}
        self._keys, self._size, self._layout = list(keys), chunk_size, layout
        self._publish, self._counters = publish, counters
        self.e_layers = frozenset(e_layers if self.wanted else ())
        layers = range(layout.layers if layout else 0)
        self._slots = {*Slot.kv(layers), *(Slot(SlotKind.E, layer) for layer in self.e_layers)}
        self._drafts: dict[int, _Draft] = {}
        self._publishing: list[Future[bool]] = []

    @property
    def wanted(self) -> bool:
        """Whether there is anything left to save; if not, `put` does nothing."""
        return any(self._keys)

    def put(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, e: torch.Tensor | None = None, *, start: int = 0
    ) -> None:
        """Takes a copy of one layer's rows for the tokens from `start` on.

        Rows of another shape or dtype than the model's (under autocast, say) are not taken: a cache that
        does not fit its model's manifest would be stored under the wrong name.

        Args:
            k, v: `[tokens, kv_heads, head_dim]`, keys after RoPE.
            e: `[tokens, hidden]`, needed where `layer` is in `e_layers`.
        """
        given = {Slot(SlotKind.K, layer): k, Slot(SlotKind.V, layer): v, Slot(SlotKind.E, layer): e}
        rows = {slot: t for slot, t in given.items() if t is not None and self._fits(slot, t)}
        end = start + k.shape[0]
        for index in range(start // self._size, min(math.ceil(end / self._size), len(self._keys))):
            if (key := self._keys[index]) is not None:
                self._fill(index, key, rows, start)

    def finish(self, *, wait: bool = False) -> int:
        """Ends the session: what is not whole by now is abandoned (counter `chunks_abandoned`).

        Returns:
            Chunks stored: all of the session's if `wait`, else those that are by now.
        """
        if self._drafts:
            self._counters.add("chunks_abandoned", amount=len(self._drafts))
            self._drafts.clear()
        self._keys.clear()
        return sum(done.result() for done in self._publishing if wait or done.done())

    def _fits(self, slot: Slot, rows: torch.Tensor) -> bool:
        layout = self._layout
        if layout is None or slot not in self._slots:
            return False
        return rows.dtype == layout.dtype and tuple(rows.shape[1:]) == layout.row(slot)

    def _fill(self, index: int, key: ChunkKey, rows: dict[Slot, torch.Tensor], start: int) -> None:
        draft = self._drafts.setdefault(index, _Draft(key, self._labels))
        first = index * self._size
        for slot, tensor in rows.items():
            low, high = max(start, first), min(start + tensor.shape[0], first + self._size)
            draft.take(slot, tensor[low - start : high - start], low - first, self._size)
        if len(draft.full) == len(self._slots):
            del self._drafts[index]
            self._keys[index] = None
            if (publishing := self._publish(draft)) is not None:
                self._publishing.append(publishing)

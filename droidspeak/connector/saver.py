"""Saving: a model's own prefill, kept layer by layer.

    put(layer, k, v, e) while the prefill proceeds  ->  a chunk is published when all its rows of all
    its slots have come  ->  finish()

A chunk that misses anything is never published. Saving never fails a request: what the store refuses
is counted and forgotten.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import torch

from droidspeak.errors import StorageError
from droidspeak.storage import Chunk, ChunkKey, Counters, Slot, SlotKind, Tier

__all__ = ["SaveSession"]

_log = logging.getLogger(__name__)


@dataclass
class _Draft:
    """One chunk being filled. `filled` has a bit for each row that has come, `full` the done slots.

    Rows may come twice (a preempted prefill starts over), so counting them would not do.
    """

    key: ChunkKey
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


class SaveSession:
    """Collects K, V and E of one prompt's full chunks.

    Args:
        keys: of the chunks, in order; `None` where the store has the chunk already.
        layers: layers of the model.
        e_layers: layers whose E is kept.
    """

    def __init__(
        self,
        store: Tier,
        keys: Sequence[ChunkKey | None],
        *,
        chunk_size: int,
        layers: int,
        e_layers: Collection[int],
        codec: str,
        executor: Executor,
        counters: Counters,
    ) -> None:
        self._store, self._keys, self._size = store, keys, chunk_size
        self._slots = {*Slot.kv(range(layers)), *(Slot(SlotKind.E, layer) for layer in e_layers)}
        self.e_layers = frozenset(e_layers)
        self._codec, self._executor, self._counters = codec, executor, counters
        self._drafts: dict[int, _Draft] = {}
        self._publishing: list[Future[bool]] = []

    @property
    def wanted(self) -> bool:
        """Whether there is anything to save; if not, `put` does nothing."""
        return any(self._keys)

    def put(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, e: torch.Tensor | None = None, *, start: int = 0
    ) -> None:
        """Takes a copy of one layer's rows for the tokens from `start` on.

        Args:
            k, v: `[tokens, kv_heads, head_dim]`, keys after RoPE.
            e: `[tokens, hidden]`, needed where `layer` is in `e_layers`.
        """
        rows = {Slot(SlotKind.K, layer): k, Slot(SlotKind.V, layer): v}
        if layer in self.e_layers and e is not None:
            rows[Slot(SlotKind.E, layer)] = e
        end = start + k.shape[0]
        for index in range(start // self._size, min(math.ceil(end / self._size), len(self._keys))):
            if (key := self._keys[index]) is not None:
                self._fill(index, key, rows, start)

    def finish(self, *, wait: bool = False) -> int:
        """Ends the session; chunks published (all that came if `wait`, else those done by now)."""
        if self._drafts:
            self._counters.add("chunks_abandoned", amount=len(self._drafts))
            self._drafts.clear()
        return sum(done.result() for done in self._publishing if wait or done.done())

    def _fill(self, index: int, key: ChunkKey, rows: dict[Slot, torch.Tensor], start: int) -> None:
        draft = self._drafts.setdefault(index, _Draft(key))
        first = index * self._size
        for slot, tensor in rows.items():
            low, high = max(start, first), min(start + tensor.shape[0], first + self._size)
            draft.take(slot, tensor[low - start : high - start], low - first, self._size)
        if len(draft.full) == len(self._slots):
            del self._drafts[index]
            self._publishing.append(self._executor.submit(self._publish, draft))

    def _publish(self, draft: _Draft) -> bool:
        try:
            self._store.write(Chunk.encode(draft.key, draft.tensors, codec=self._codec))
        except StorageError as error:
            self._counters.add("save_failures")
            _log.debug("chunk %s not saved: %s", draft.key, error)
            return False
        self._counters.add("chunks_saved")
        return True

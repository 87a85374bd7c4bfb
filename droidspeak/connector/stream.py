"""The layer stream: a match on its way from the store into the engine's memory.

Order of loading (the paper's Figure 13): E of the transition layers, the own exact chunks of the
layers to be recomputed, then K and V of all other layers, ascending. Recompute needs only the first
two; the rest arrives while it runs. Each layer is awaited just before it is needed:

    with connector.load(match) as stream:
        e = stream.e(layer)            # [shared tokens, hidden]
        k, v = stream.kv(layer)        # [tokens, kv_heads, head_dim]

Raw slots land straight in the tensors that `kv` returns. Anything that goes wrong (missing, corrupt,
late, unreachable) ends the stream: every later await raises `LoadFailed` with the reason.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from droidspeak.connector.match import Match
from droidspeak.connector.status import Reason
from droidspeak.errors import ChunkCorrupt, ChunkIncomplete, LoadFailed, StorageError, TierTimeout
from droidspeak.layerselect import Plan
from droidspeak.storage import ChunkInfo, ChunkKey, Slot, SlotKind, Tier

__all__ = ["LayerStream"]


@dataclass(frozen=True)
class _Job:
    """Slots of one chunk, and the tokens that they fill."""

    key: ChunkKey
    slots: tuple[Slot, ...]
    rows: slice


class LayerStream:
    """Loads a match in the background.

    Args:
        device: where the tensors are wanted.
        loaders: threads that read and decode.
        deadline: seconds from now until the last await must be answered.
    """

    def __init__(
        self, store: Tier, match: Match, *, device: torch.device, loaders: int = 2, deadline: float = 30.0
    ) -> None:
        self._store, self._match = store, match
        self._ends_at = time.monotonic() + deadline
        if match.receiver is None or not match:
            raise ValueError("a match without chunks cannot be loaded")
        shape = match.receiver.architecture
        self._dtype: torch.dtype = getattr(torch, shape.dtype)
        self._kv_shape = (match.tokens, shape.kv_heads, shape.head_dim)
        self._e_shape = (match.shared_tokens, shape.hidden_size)
        self._device = device
        self._plan = match.plan or Plan.parse("reuse", shape.layers)
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._tensors: dict[Slot, torch.Tensor] = {}
        self._jobs = deque(self._schedule())
        self._missing = Counter(slot for job in self._jobs for slot in job.slots)
        self.bytes_loaded = 0
        self.wait_seconds = 0.0
        for n in range(min(loaders, len(self._jobs))):
            threading.Thread(target=self._work, name=f"droidspeak-load-{n}", daemon=True).start()

    def e(self, layer: int) -> torch.Tensor:
        """E of transition layer `layer` for the shared tokens, `[shared tokens, hidden]`.

        Raises:
            LoadFailed: the stream has ended; its `reason` says why.
        """
        slot = Slot(SlotKind.E, layer)
        self._wait([slot])
        return self._tensors[slot]

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `layer`, each `[tokens, kv_heads, head_dim]`.

        Of a recomputed layer only the first `exact_tokens` rows are filled.

        Raises:
            LoadFailed: the stream has ended; its `reason` says why.
        """
        k, v = Slot.kv([layer])
        self._wait([k, v])
        return self._place(k), self._place(v)

    def close(self) -> None:
        """Stops loading. Jobs under way end on their own."""
        with self._changed:
            self._closed = True
            self._jobs.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _schedule(self) -> Iterator[_Job]:
        plan, match = self._plan, self._match
        for layer in plan.transition_layers:
            yield from self._jobs_of(match.shared, [Slot(SlotKind.E, layer)])
        recomputed = [layer for group in plan.groups for layer in group]
        yield from self._jobs_of(match.exact, Slot.kv(recomputed))
        for batch in self._batches(plan.loaded):
            yield from self._jobs_of(match.exact, Slot.kv(batch))
            yield from self._jobs_of(match.shared, Slot.kv(batch))

    def _jobs_of(self, infos: tuple[ChunkInfo, ...], slots: list[Slot]) -> Iterator[_Job]:
        size, before = self._match.chunk_size, len(self._match.exact)
        own = infos is self._match.exact
        if not slots:
            return
        for n, info in enumerate(infos):
            first = (n if own or slots[0].kind is SlotKind.E else n + before) * size
            yield _Job(info.key, tuple(slots), slice(first, first + size))

    def _batches(self, layers: tuple[int, ...]) -> Iterator[list[int]]:
        """Neighbouring layers whose bytes in one chunk make one good request."""
        per_layer = 2 * self._match.chunk_size * self._kv_shape[1] * self._kv_shape[2] * self._dtype.itemsize
        count = max(1, self._store.best_read // per_layer)
        for start in range(0, len(layers), count):
            yield list(layers[start : start + count])

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                loaded = self._load(job)
            except StorageError as error:
                self._fail(LoadFailed(_reason(error), str(error)))
                return
            except BaseException as error:
                self._fail(error)
                raise
            self._arrived(job, loaded)

    def _next(self) -> _Job | None:
        with self._changed:
            if self._closed or self._error is not None or not self._jobs:
                return None
            return self._jobs.popleft()

    def _load(self, job: _Job) -> int:
        into = {slot: self._place(slot)[job.rows] for slot in job.slots}
        chunk = self._store.read(job.key, job.slots, into)
        if chunk is None:
            raise ChunkIncomplete(f"chunk {job.key} is gone")
        for slot in job.slots:
            chunk.tensor(slot, into[slot])
        return sum(chunk.payload[slot].numel() for slot in job.slots)

    def _place(self, slot: Slot) -> torch.Tensor:
        with self._changed:
            if slot not in self._tensors:
                shape = self._e_shape if slot.kind is SlotKind.E else self._kv_shape
                self._tensors[slot] = torch.empty(shape, dtype=self._dtype, device=self._device)
            return self._tensors[slot]

    def _arrived(self, job: _Job, loaded: int) -> None:
        with self._changed:
            self.bytes_loaded += loaded
            self._missing.subtract(job.slots)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._jobs.clear()
            self._changed.notify_all()

    def _wait(self, slots: list[Slot]) -> None:
        started = time.monotonic()
        with self._changed:
            left = max(0.0, self._ends_at - started)
            done = self._changed.wait_for(lambda: self._error is not None or self._here(slots), left)
            self.wait_seconds += time.monotonic() - started
            if self._error is not None:
                raise self._error
            if not done:
                self._error = LoadFailed(Reason.TIMEOUT, "the store did not deliver before the deadline")
                self._jobs.clear()
                raise self._error

    def _here(self, slots: list[Slot]) -> bool:
        return all(self._missing[slot] == 0 for slot in slots)


def _reason(error: StorageError) -> Reason:
    if isinstance(error, ChunkCorrupt):
        return Reason.CORRUPT
    if isinstance(error, TierTimeout):
        return Reason.TIMEOUT
    if isinstance(error, ChunkIncomplete):
        return Reason.EVICTED
    return Reason.STORE_UNAVAILABLE

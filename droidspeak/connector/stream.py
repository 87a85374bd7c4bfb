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
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch

from droidspeak.connector.bandwidth import Bandwidths, TransferClock
from droidspeak.connector.layout import RowLayout
from droidspeak.connector.match import Match
from droidspeak.connector.memory import LoadMemory
from droidspeak.connector.shards import Part, Shard
from droidspeak.connector.status import Reason
from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    LoadFailed,
    StorageError,
    TierTimeout,
    UsageError,
)
from droidspeak.layerselect import Action, Plan
from droidspeak.storage import Chunk, ChunkInfo, ChunkKey, Slot, SlotKind, Tier
from droidspeak.tracing import LongSpan

__all__ = ["LayerStream"]


@dataclass(frozen=True)
class _Job:
    """Slots of one chunk, and the rows that they fill.

    Attributes:
        part: of the heads, where the chunk is of another tensor-parallel degree.
    """

    key: ChunkKey
    slots: tuple[Slot, ...]
    rows: slice
    tier: str
    part: Part | None = None


class LayerStream:
    """Loads a match in the background.

    Args:
        device: where the tensors are wanted.
        loaders: threads that read and decode.
        deadline: seconds from now until the last await must be answered.
        shard: the receiver's, of the model's heads; chunks of other degrees are taken apart and put together.
        bandwidths: told how fast each tier was, when everything has come.
        memory: where tensors on the host are made.
        traced: ended when the stream is closed.

    Attributes:
        bytes_loaded: stored bytes that have come so far.
        wait_seconds: time for which awaits stood still.

    Raises:
        UsageError: a match without chunks.
    """

    def __init__(
        self,
        store: Tier,
        match: Match,
        *,
        device: torch.device,
        loaders: int = 2,
        deadline: float = 30.0,
        shard: Shard = Shard(0, 1),  # noqa: B008 - it cannot be changed
        bandwidths: Bandwidths | None = None,
        memory: LoadMemory | None = None,
        traced: LongSpan | None = None,
    ) -> None:
        if match.receiver is None or not match:
            raise UsageError("a match without chunks cannot be loaded")
        self._ends_at = time.monotonic() + deadline
        self._store, self._match, self._device = store, match, device
        self._architecture, self._shard = match.receiver.architecture, shard
        self._layout = RowLayout.of(self._architecture, shard.size)
        self._plan = match.plan or Plan.recompute(self._layout.layers, ())
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._tensors: dict[Slot, torch.Tensor] = {}
        self._parts: dict[ChunkKey, list[tuple[ChunkKey, Part | None]]] = {}
        self._jobs = deque(self._schedule())
        self._missing = Counter(slot for job in self._jobs for slot in job.slots)
        self._lease = memory.lease(map(self._nbytes, self._missing)) if memory and self._on_host else None
        self._reading = 0
        self._corrupt: ChunkCorrupt | None = None
        self._clock, self._bandwidths = TransferClock(), bandwidths
        self._traced = traced
        self.bytes_loaded = 0
        self.wait_seconds = 0.0
        for n in range(min(loaders, len(self._jobs))):
            threading.Thread(target=self._work, name=f"droidspeak-load-{n}", daemon=True).start()

    def e(self, layer: int) -> torch.Tensor:
        """E of transition layer `layer` for the shared tokens, `[shared tokens, hidden]`.

        Raises:
            LoadFailed: the stream has ended; its `reason` says why.
            UsageError: no transition layer of the plan, or the stream was closed.
        """
        if layer not in self._plan.transition_layers:
            raise UsageError(f"plan {self._plan} has no transition layer {layer}")
        slot = Slot(SlotKind.E, layer)
        self._wait([slot])
        return self._place(slot)

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `layer`, each `[tokens, kv_heads, head_dim]`.

        Of a recomputed layer only the exact tokens are there.

        Raises:
            LoadFailed: the stream has ended; its `reason` says why.
            UsageError: no layer of the model, or the stream was closed.
        """
        if not 0 <= layer < self._layout.layers:
            raise UsageError(f"layer {layer}: the model has layers 0-{self._layout.layers - 1}")
        k, v = Slot.kv([layer])
        self._wait([k, v])
        return self._place(k), self._place(v)

    def ready(self, layers: Collection[int], e_layers: Collection[int] = (), *, timeout: float = 0.0) -> bool:
        """Whether `kv` of all `layers` and `e` of all `e_layers` return, or raise, without waiting.

        Args:
            timeout: seconds to wait until it is so.
        """
        slots = [*Slot.kv(layers), *(Slot(SlotKind.E, layer) for layer in e_layers)]
        with self._changed:
            patience = min(timeout, self._seconds_left())
            return self._changed.wait_for(lambda: self._settled(slots), patience) or not self._seconds_left()

    def close(self) -> None:
        """Stops loading. Reads under way end on their own, into memory that nobody else gets."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        if self._traced is not None:
            told = {"droidspeak.bytes": self.bytes_loaded, "droidspeak.wait_seconds": self.wait_seconds}
            self._traced.end(told, self._failure)

    @property
    def _failure(self) -> str | None:
        if self._error is None:
            return None
        return self._error.reason if isinstance(self._error, LoadFailed) else type(self._error).__name__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what to load, and where to ---

    def _schedule(self) -> Iterator[_Job]:
        plan, match = self._plan, self._match
        for layer in plan.transition_layers:
            yield from self._jobs_of(match.shared, [Slot(SlotKind.E, layer)], whole=True)
        recomputed = [layer for group in plan.groups for layer in group]
        yield from self._jobs_of(match.exact, Slot.kv(recomputed))
        for batch in self._batches(plan.loaded):
            slots = Slot.kv(batch)
            yield from self._jobs_of(match.exact, slots)
            yield from self._jobs_of(match.shared, slots, match.exact_tokens)

    def _jobs_of(
        self, infos: Sequence[ChunkInfo], slots: Sequence[Slot], first: int = 0, *, whole: bool = False
    ) -> Iterator[_Job]:
        """`slots` of each chunk of `infos`, whose rows lie one after the other from row `first` on.

        Args:
            whole: any shard has all of them.
        """
        size = self._match.chunk_size
        for n, info in enumerate(infos if slots else ()):
            rows = slice(first + n * size, first + (n + 1) * size)
            parts = self._parts_of(info.key)
            for key, part in parts[:1] if whole else parts:
                yield _Job(key, tuple(slots), rows, info.tier or self._store.name, None if whole else part)

    def _parts_of(self, key: ChunkKey) -> Sequence[tuple[ChunkKey, Part | None]]:
        """The chunks that together hold this shard's heads of a chunk; without parts where it is one chunk.

        A match names the same chunk for every layer, so what is found once is kept.
        """
        found = self._parts.get(key)
        if found is None:
            size = Shard.parse(key.shard).size
            parts = self._shard.parts(size, self._architecture.kv_heads)
            found = self._parts[key] = [
                (replace(key, shard=str(part.shard)), None if size == self._shard.size else part)
                for part in parts
            ]
        return found

    def _batches(self, layers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Layers in order, as many at a time as make one good request of one chunk's bytes."""
        count = max(1, self._store.best_read // (self._match.chunk_size * self._layout.kv_bytes))
        for start in range(0, len(layers), count):
            yield layers[start : start + count]

    def _place(self, slot: Slot) -> torch.Tensor:
        """The tensor of `slot`, made when it is first needed."""
        with self._changed:
            if slot not in self._tensors:
                self._tensors[slot] = self._new(slot)
            return self._tensors[slot]

    def _new(self, slot: Slot) -> torch.Tensor:
        shape, dtype = (self._rows(slot), *self._layout.row(slot)), self._layout.dtype
        if self._lease is not None:
            return self._lease.tensor(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self._device)

    @property
    def _on_host(self) -> bool:
        return self._device.type == "cpu"

    def _nbytes(self, slot: Slot) -> int:
        return self._rows(slot) * self._layout.row_bytes(slot)

    def _rows(self, slot: Slot) -> int:
        if slot.kind is SlotKind.E:
            return self._match.shared_tokens
        recomputed = self._plan.actions[slot.layer] is Action.RECOMPUTE
        return self._match.exact_tokens if recomputed else self._match.tokens

    # --- loading ---

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                loaded = self._load(job)
            except StorageError as error:
                self._failed(error)
            except BaseException as error:  # noqa: BLE001 - whoever awaits a layer gets it
                self._end(error)
            else:
                self._arrived(job, loaded)

    def _next(self) -> _Job | None:
        with self._changed:
            if not self._jobs:
                return None
            job = self._jobs.popleft()
            self._reading += 1
            self._clock.start(job.tier)
            return job

    def _load(self, job: _Job) -> int:
        into = {slot: self._target(job, slot) for slot in job.slots}
        chunk = self._read(job, into)
        for slot in job.slots:
            chunk.tensor(slot, into[slot])
            if job.part:
                self._place(slot)[job.rows, job.part.own] = into[slot][:, job.part.held].to(self._device)
        return sum(chunk.payload[slot].numel() for slot in job.slots)

    def _target(self, job: _Job, slot: Slot) -> torch.Tensor:
        """Where the rows of `slot` are decoded: where they are wanted, if all of their heads are."""
        if job.part is None:
            return self._place(slot)[job.rows]
        layout = RowLayout.of(self._architecture, job.part.shard.size)
        return torch.empty((self._match.chunk_size, *layout.row(slot)), dtype=layout.dtype)

    def _read(self, job: _Job, into: dict[Slot, torch.Tensor]) -> Chunk:
        try:
            chunk = self._store.read(job.key, job.slots, into)
        except ChunkCorrupt:
            # Before anybody hears of it: the prefill that follows must find the place free to save.
            with suppress(StorageError):
                self._store.quarantine(job.key)
            raise
        if chunk is None:
            raise ChunkIncomplete(f"chunk {job.key} is gone")
        return chunk

    def _arrived(self, job: _Job, loaded: int) -> None:
        with self._changed:
            self.bytes_loaded += loaded
            self._missing.subtract(job.slots)
            self._reading -= 1
            self._clock.stop(job.tier, self._decoded(job))
            self._changed.notify_all()
            if not (self._jobs or self._reading or self._error or self._closed):
                self._report()

    def _decoded(self, job: _Job) -> int:
        """Bytes of this shard that `job` has filled."""
        size = self._match.chunk_size * sum(self._layout.row_bytes(slot) for slot in job.slots)
        return size if job.part is None else size * _count(job.part.own) // self._layout.kv[0]

    def _report(self) -> None:
        if self._bandwidths is not None:
            for transfer in self._clock.transfers():
                self._bandwidths.add(transfer)

    def _failed(self, error: StorageError) -> None:
        """Ends the stream; if chunks turned out bad, after the other loaders have told what they found.

        Of two loaders on one corrupt chunk, one may find it gone already. And what the engine saves next
        must not meet the quarantine of what stood there.
        """
        with self._changed:
            self._reading -= 1
            self._jobs.clear()
            self._changed.notify_all()
            if isinstance(error, ChunkCorrupt):
                self._corrupt = error
            if isinstance(error, ChunkCorrupt | ChunkIncomplete):
                self._changed.wait_for(self._quiet, self._seconds_left())
            cause = self._corrupt or error
            self._end(LoadFailed(_reason(cause), str(cause)))

    def _end(self, error: BaseException) -> None:
        """Ends the stream with `error`, unless it has ended already."""
        with self._changed:
            self._error = self._error or error
            self._jobs.clear()
            self._changed.notify_all()

    # --- waiting ---

    def _wait(self, slots: Sequence[Slot]) -> None:
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._settled(slots), self._seconds_left())
            self.wait_seconds += time.monotonic() - started
            if not self._settled(slots):
                self._end(LoadFailed(Reason.TIMEOUT, "the store did not deliver before the deadline"))
            if self._error is not None:
                raise self._error
            if not self._here(slots):
                raise UsageError("the stream was closed before these layers had come")

    def _quiet(self) -> bool:
        return self._error is not None or self._closed or not self._reading

    def _seconds_left(self) -> float:
        return max(0.0, self._ends_at - time.monotonic())

    def _settled(self, slots: Sequence[Slot]) -> bool:
        return self._error is not None or self._closed or self._here(slots)

    def _here(self, slots: Sequence[Slot]) -> bool:
        return all(self._missing[slot] == 0 for slot in slots)


def _count(heads: slice) -> int:
    return int(heads.stop - heads.start)


def _reason(error: StorageError) -> Reason:
    if isinstance(error, ChunkCorrupt):
        return Reason.CORRUPT
    if isinstance(error, TierTimeout):
        return Reason.TIMEOUT
    if isinstance(error, ChunkIncomplete):
        return Reason.EVICTED
    return Reason.STORE_UNAVAILABLE

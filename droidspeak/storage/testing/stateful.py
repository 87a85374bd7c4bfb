"""Any sequence of calls against a plain dict."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from droidspeak.errors import ChunkIncomplete, TierFull
from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.testing.chunks import assert_holds, make_chunk, make_key
from droidspeak.storage.tier import ChunkInfo, Tier

__all__ = ["TierStateMachine"]

_SEEDS = st.integers(0, 5)
_CHUNKS = st.builds(
    lambda seed, content, e_layers, codec: make_chunk(
        content, key=make_key(seed), layers=2, e_layers=e_layers, codec=codec
    ),
    _SEEDS,
    st.integers(0, 3),
    st.sampled_from([(), (0,), (1,), (0, 1)]),
    st.sampled_from(["raw", "zstd"]),
)
_SLOTS = st.lists(st.sampled_from([*Slot.kv(range(2)), Slot(SlotKind.E, 0), Slot(SlotKind.E, 1)]))


class TierStateMachine(RuleBasedStateMachine):
    """Any sequence of calls gives what a dict would give.

    A tier with a capacity may have lost what is not pinned, and must never give anything else; what was
    seen lost stays lost.

    Attributes:
        persistent: as in `TierConformance`.
        capacity: of the tier in bytes; `None`: it never evicts.
    """

    persistent: ClassVar[bool] = False
    capacity: ClassVar[int | None] = None

    def make_tier(self, place: Path, capacity: int | None = None) -> Tier:
        """A tier on `place`, a folder of this run's own; `capacity` in bytes."""
        raise NotImplementedError

    def cost(self, chunk: Chunk) -> int:
        """Bytes that `chunk` takes of the tier's capacity."""
        return chunk.header.nbytes

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._tier = self.make_tier(Path(self._folder.name), self.capacity)
        self._model: dict[ChunkKey, Chunk] = {}
        self._pinned: set[ChunkKey] = set()

    def teardown(self) -> None:
        self._tier.close()
        self._folder.cleanup()

    def _expected(self, key: ChunkKey, found: bool) -> Chunk | None:
        """The chunk that the tier should have, after `found` has been judged."""
        if not found:
            assert key not in self._model or (self.capacity is not None and key not in self._pinned)
            self._model.pop(key, None)
        return self._model.get(key)

    @rule(chunk=_CHUNKS)
    def write(self, chunk: Chunk) -> None:
        try:
            self._tier.write(chunk)
        except TierFull:
            others = self._pinned - {chunk.key}
            needed = self.cost(chunk) + sum(self.cost(self._model[key]) for key in others)
            assert self.capacity is not None
            assert needed > self.capacity
        else:
            self._model[chunk.key] = chunk

    @rule(seed=_SEEDS)
    def read_all(self, seed: int) -> None:
        key = make_key(seed)
        got = self._tier.read(key)
        if expected := self._expected(key, got is not None):
            assert_holds(got, expected)
        else:
            assert got is None

    @rule(seed=_SEEDS, slots=_SLOTS)
    def read_some(self, seed: int, slots: list[Slot]) -> None:
        key = make_key(seed)
        try:
            got = self._tier.read(key, slots)
        except ChunkIncomplete:
            assert not set(slots) <= set(self._model[key].payload)
            return
        if expected := self._expected(key, got is not None):
            assert_holds(got, expected, slots)
        else:
            assert got is None

    @rule(seed=_SEEDS)
    def head(self, seed: int) -> None:
        key = make_key(seed)
        info = self._tier.head(key)
        expected = self._expected(key, info is not None)
        assert info == (expected and ChunkInfo.of(expected))

    @rule(seeds=st.lists(_SEEDS))
    def leading(self, seeds: list[int]) -> None:
        keys = [make_key(seed) for seed in seeds]
        found = self._tier.leading(keys)
        assert found == [ChunkInfo.of(self._model[key]) for key in keys[: len(found)]]
        if len(found) < len(keys):
            assert self._expected(keys[len(found)], found=False) is None

    @rule(seed=_SEEDS)
    def delete(self, seed: int) -> None:
        key = make_key(seed)
        found = self._tier.delete(key)
        assert found == (self._expected(key, found) is not None)
        self._model.pop(key, None)
        self._pinned.discard(key)

    @rule(seed=_SEEDS, pinned=st.booleans())
    def pin(self, seed: int, pinned: bool) -> None:
        key = make_key(seed)
        found = self._tier.pin(key) if pinned else self._tier.unpin(key)
        assert found == (self._expected(key, found) is not None)
        self._pinned = self._pinned | {key} if pinned and found else self._pinned - {key}

    @precondition(lambda self: self.capacity is not None)
    @rule(nbytes=st.integers(0, 5000))
    def evict(self, nbytes: int) -> None:
        before = self._tier.usage().nbytes
        freed = self._tier.evict(nbytes)
        assert freed == before - self._tier.usage().nbytes
        assert freed >= nbytes or set(self._tier.keys()) <= self._pinned

    @precondition(lambda self: self.persistent)
    @rule()
    def reopen(self) -> None:
        self._tier.close()
        self._tier = self.make_tier(Path(self._folder.name), self.capacity)

    @invariant()
    def keys_and_usage_agree(self) -> None:
        keys = set(self._tier.keys())
        for key in set(self._model) | keys:
            assert (key in keys) == (self._expected(key, key in keys) is not None)
        usage = self._tier.usage()
        assert usage.chunks == len(keys)
        assert usage.nbytes == sum(self.cost(self._model[key]) for key in keys)
        assert usage.nbytes <= (usage.nbytes if self.capacity is None else self.capacity)

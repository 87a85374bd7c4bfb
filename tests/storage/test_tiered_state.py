"""A store of memory and disk is a tier: it conforms, and any sequence of calls gives what a dict would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis.stateful import invariant, rule

from droidspeak.storage.container import Chunk
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.testing import TierConformance, TierStateMachine, make_chunk
from droidspeak.storage.tier import Tier
from droidspeak.storage.tiered import TieredStore, WriteBackOptions

MIB = 1 << 20
LITTLE = 3 * make_chunk(0).header.nbytes


class Settled(TieredStore):
    """Writes and promotions are done when a call returns, so that usage can be foretold."""

    def write(self, chunk: Chunk) -> None:
        super().write(chunk)
        assert self.flush(30)

    def read(self, *args: Any, **options: Any) -> Chunk | None:
        try:
            return super().read(*args, **options)
        finally:
            assert self.flush(30)


class TestMemoryAndDisk(TierConformance):
    """The back door takes from memory what it changes on the disk: else memory's good copy is served.

    Not `persistent`: memory is empty after reopening, so usage is another. `TieredMachine` reopens.
    """

    operations = 30

    def make_tier(self, place: Path, capacity: int | None = None) -> Tier:
        return Settled([MemoryTier(MIB, name="memory"), DiskTier(place, min_free=0)])

    def get_bytes(self, tier: Tier, key: ChunkKey) -> bytes | None:
        path = _path(tier, key)
        return path.read_bytes() if path.exists() else None

    def put_bytes(self, tier: Any, key: ChunkKey, data: bytes) -> None:
        tier.tiers[0].delete(key)
        _path(tier, key).write_bytes(data)

    def drop(self, tier: Any, key: ChunkKey) -> None:
        tier.tiers[0].delete(key)
        _path(tier, key).unlink()

    def cost(self, chunk: Chunk) -> int:
        return 2 * chunk.header.nbytes


def _path(store: Any, key: ChunkKey) -> Path:
    path: Path = store.tiers[1].tier.path(key)
    return path


class TieredMachine(TierStateMachine):
    """Nothing is lost and nothing is wrong, wherever a chunk is: in memory, on its way, on the disk."""

    persistent = True
    memory = LITTLE
    queue = MIB

    def make_tier(self, place: Path, capacity: int | None = None) -> Tier:
        tiers = [MemoryTier(self.memory, name="memory"), DiskTier(place / "disk", min_free=0)]
        return TieredStore(tiers, write_back=WriteBackOptions(self.queue, put_timeout=30, close_timeout=30))

    @rule()
    def flush(self) -> None:
        assert self._tier.flush(30)
        disk = self._tier.tiers[-1]
        assert set(disk.keys()) == set(self._model)

    @invariant()
    def keys_and_usage_agree(self) -> None:
        assert set(self._tier.keys()) == set(self._model)
        assert self._tier.usage().chunks == len(self._model)
        assert self._tier.by_tier()["memory"].nbytes <= self.memory

    def teardown(self) -> None:
        failures = {name: self._tier.counters.get(name) for name in ("corrupt", "failures", "writes_dropped")}
        super().teardown()
        assert not any(failures.values()), failures


class CrowdedMachine(TieredMachine):
    """Memory and queue have room for a chunk or two."""

    memory = LITTLE // 2
    queue = LITTLE // 2


TestTieredMachine = TieredMachine.TestCase
TestCrowdedMachine = CrowdedMachine.TestCase
TestTieredMachine.settings = TestCrowdedMachine.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None
)

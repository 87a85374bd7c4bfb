"""The conformance suite that every tier passes. Public: test your own tier with it.

    class TestMyTier(TierConformance):
        persistent = True

        def make_tier(self, place: Path, capacity: int | None = None) -> Tier: ...
        def get_bytes(self, tier: Tier, key: ChunkKey) -> bytes | None: ...
        def put_bytes(self, tier: Tier, key: ChunkKey, data: bytes) -> None: ...

    class MyMachine(TierStateMachine):
        persistent = True
        make_tier = TestMyTier.make_tier

    TestMyMachine = MyMachine.TestCase

`get_bytes` and `put_bytes` are back doors: they look at, and change, what the tier keeps without asking
the tier. Needs pytest and hypothesis; nothing outside of tests imports this module.

After zarr-python's `zarr/testing/store.py` and `zarr/testing/stateful.py`.
"""

from droidspeak.storage.testing.chunks import DTYPES, assert_holds, make_chunk, make_key
from droidspeak.storage.testing.conformance import TierConformance
from droidspeak.storage.testing.stateful import TierStateMachine

__all__ = ["DTYPES", "TierConformance", "TierStateMachine", "assert_holds", "make_chunk", "make_key"]

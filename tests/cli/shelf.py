"""A store with a little of everything, for calls of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from droidspeak.connector.reports import encoded
from droidspeak.layerselect import Plan, Policy
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.storage import Architecture, SourceManifest
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.testing import make_chunk, make_key
from tests.server.pagestore import pair, report

__all__ = ["KEY", "RECEIVER", "SENDER", "Shelf", "shelf"]

_ARCHITECTURE = Architecture("llama", 4, 2, 4, 8, 100, "{}", "{}", "bfloat16")
SENDER = SourceManifest("1" * 64, _ARCHITECTURE, "ids:100")
RECEIVER = SourceManifest("2" * 64, _ARCHITECTURE, "ids:100")
KEY = ChunkKey(SENDER.source_id, "0of1", make_key(0).prefix)


@dataclass(frozen=True)
class Shelf:
    """`store` is the URL of a disk store, `root` its folder, `place` an empty folder."""

    root: Path
    place: Path

    @property
    def store(self) -> str:
        return f"disk://{self.root}?capacity=1MiB&min_free=0"

    def damage(self) -> None:
        """Cuts one of the files off."""
        with DiskTier(self.root, read_only=True) as tier:
            tier.path(KEY).write_bytes(b"")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Chunks of two models, one of a tenant and pinned; a policy for the pair, and an engine's report."""
    root, place, policies = (tmp_path / name for name in ("shelf", "place", "policies"))
    place.mkdir()
    policies.mkdir()
    policy = Policy.fixed(SENDER.source_id, RECEIVER.source_id, Plan.parse("2-3", 4))
    write_policy(policies / "pair.json", policy, Side.of("base", SENDER), Side.of("tuned", RECEIVER))
    monkeypatch.setenv("DROIDSPEAK_POLICIES", str(policies))
    with DiskTier(root, min_free=0) as tier:
        for seed in range(4):
            source = (SENDER if seed < 3 else RECEIVER).source_id
            key = ChunkKey(source, "0of1", make_key(seed).prefix)
            tier.write(make_chunk(seed, key=key, layers=4, e_layers=(2,), salt="tenant" * (seed == 0)))
        tier.pin(KEY)
        told = report(pair("base", "tuned", 51200), pair("tuned", "tuned", 20480))
        tier.put_report(told.id, encoded(told))
    return Shelf(root, place)

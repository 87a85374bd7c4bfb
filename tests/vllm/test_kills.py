"""The daemon is killed, or frozen and then killed, in the middle of a load; and comes back.

The request that was loading gets the receiver's own answer, and so does who comes next. A connection that has
ended is noticed at once: only a daemon that is still there is waited for, up to the deadline.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from droidspeak.connector import Reason
from droidspeak.integrations.transformers import capture
from droidspeak.storage import SourceManifest

from .engines import Answer, Engine, Request
from .models import (
    Reference,
    answer,
    assert_near,
    assert_said,
    door,
    keys_of,
    load,
    prompt,
    store_prefill,
    stored,
    write_plan,
)
from .processes import Daemon
from .stores import Disk, Wire, wait_for

SIZE, LENGTH = 64, 700
FEW = 60  # forwards; a handful is needed
LOST, LATE = ("fallback_reprefill", "store_unavailable"), ("fallback_reprefill", "timeout")
_numbers = itertools.count(1)


def fresh(length: int = LENGTH) -> list[int]:
    """A prompt that nobody has seen."""
    return prompt(next(_numbers), length)


@dataclass(frozen=True)
class World:
    """A receiver whose store is a daemon's, behind a wire that notices what is loaded.

    Attributes:
        mode: of loading.
    """

    engine: Engine
    daemon: Daemon
    wire: Wire
    disk: Disk
    folders: tuple[Path, Path]
    manifests: tuple[SourceManifest, SourceManifest]
    policies: str
    mode: str

    def send(self, *, own: bool) -> list[int]:
        """A prompt that the sender, or the receiver itself, has stored."""
        ids = fresh()
        store_prefill(self.disk.tier, self.folders[own], self.manifests[own], ids, SIZE)
        return ids

    def own(self, ids: list[int]) -> Reference:
        return answer(load(self.folders[1]), ids)

    def mixed(self, ids: list[int]) -> Reference:
        with door(self.folders[1], self.disk.tier, SIZE, self.policies) as transformers:
            return answer(load(self.folders[1]), ids, transformers.prefill(ids))

    def ask(self, ids: list[int]) -> Answer:
        """The answer to a prompt that comes while another one is decoded, which must not notice."""
        other = fresh(50)
        neighbour, answered = self.engine.ask(Request(other, new=12), Request(ids, at=2))
        assert_said(neighbour, answer(load(self.folders[1]), other, new=12))
        return answered

    def revive(self) -> None:
        """Starts the daemon anew, on its port, and returns when the engine has found it."""
        self.wire.mend()
        self.daemon.start()
        wait_for(lambda: self.engine.ask(Request(fresh(100), new=1))[0].status[1] == "miss", "the daemon")

    def reasons(self, reason: Reason) -> int:
        """Requests so far with this reason. Counts travel with steps: those of the last one need others."""
        self.engine.tell(*(Request(fresh(16), new=1) for _ in range(2)))
        return self.engine.count("droidspeak_events", event="reasons", label=reason.value)


@pytest.fixture(scope="module", params=["sync", "async"])
def world(request, start, folders, manifests, tmp_path_factory) -> Iterator[World]:
    root = tmp_path_factory.mktemp(request.param)
    policies = write_plan(root / "policies", *manifests, "1-2")
    daemon = Daemon(root / "store")
    try:
        with Disk(root / "store") as disk, Wire(daemon.port) as wire:
            engine = start(
                folders[1],
                tiers=[f"droidspeak://127.0.0.1:{wire.port}"],
                chunk_size=SIZE,
                policies=policies,
                load_deadline=2.0,
                limits={"remote": {"read_deadline": 20.0, "cooldown": 0.1, "max_cooldown": 0.1}},
                vllm={"load": request.param},
            )
            yield World(engine, daemon, wire, disk, folders, manifests, policies, request.param)
            engine.close()
    finally:
        daemon.kill()


@pytest.mark.parametrize(
    ("how", "budget"),
    [(Daemon.kill, 20_000), (Daemon.kill, 300_000), (Daemon.kill, 900_000), (Daemon.freeze, 300_000)],
)
@pytest.mark.parametrize("own", [False, True], ids=["sender's", "own"])
def test_a_daemon_that_is_killed_in_the_middle_of_a_load(world, how, own, budget):
    before, ids, untouched = (world.send(own=own) for _ in range(3))
    assert world.ask(before).status[0] == "applied"
    expected = LOST if how is Daemon.kill else LATE
    counted = world.reasons(Reason(expected[1]))
    world.wire.budget, world.wire.then = budget, lambda: how(world.daemon)
    answered = world.ask(ids)
    assert world.wire.then is None, "the load was over before"
    assert answered.status == expected
    assert (answered.told["exact_tokens"], answered.told["shared_tokens"]) == (0, 0)
    assert answered.forwards < FEW
    assert_said(answered, world.own(ids))
    world.daemon.kill()
    following = world.ask(untouched)
    assert following.status == LOST
    assert_said(following, world.own(untouched))
    world.revive()
    assert world.reasons(Reason(expected[1])) > counted
    assert world.engine.forget()
    (again,) = world.engine.ask(Request(ids))
    assert again.status == ("applied", "exact_hit" if own else "cross_model_hit")
    assert_said(again, world.own(ids) if own else world.mixed(ids))
    # What is prefilled now is kept again.
    new = fresh(200)
    world.engine.ask(Request(new))
    keys = keys_of(world.manifests[1], new, SIZE)
    world.disk.wait(keys)
    assert_near(stored(world.disk.tier, keys), capture(load(world.folders[1]), torch.tensor(new)))

"""Loads that fail: the engine says what it would have said without a cache, and why there was none.

A load that fails must not be tried again and again, nor may anything computed over its blocks be kept.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from droidspeak.integrations.transformers import capture
from droidspeak.storage import SourceManifest

from .engines import Engine, Request
from .models import answer, assert_near, assert_said, keys_of, load, prompt, store_prefill, stored, write_plan
from .processes import Daemon
from .stores import Disk, Wire, wait_for

SIZE, LENGTH, WHOLE = 64, 230, 192
FEW = 60  # steps; a handful is needed
HIT = ("applied", "cross_model_hit")


@pytest.fixture(scope="module")
def policies(tmp_path_factory, manifests) -> str:
    return write_plan(tmp_path_factory.mktemp("policies"), *manifests, "1-2")


@dataclass(frozen=True)
class World:
    """A receiver, and the store that it reads."""

    engine: Engine
    disk: Disk
    folders: tuple[Path, Path]
    manifests: tuple[SourceManifest, SourceManifest]

    def send(self, ids: list[int], *, own: bool = False) -> list[Path]:
        """Stores a prompt as the sender or as the receiver; returns the files."""
        store_prefill(self.disk.tier, self.folders[own], self.manifests[own], ids, SIZE)
        return [self.disk.file(key) for key in keys_of(self.manifests[own], ids, SIZE)]

    def ask(self, ids: list[int], number: int):
        """The answer to a prompt that comes while another one is decoded, which must not notice."""
        other = prompt(1000 + number, 50)
        neighbour, answered = self.engine.ask(Request(other, new=12), Request(ids, at=2))
        assert_said(neighbour, answer(load(self.folders[1]), other, new=12))
        return answered

    def own(self, ids: list[int]):
        return answer(load(self.folders[1]), ids)


@pytest.fixture(scope="module", params=["sync", "async"])
def world(request, start, folders, manifests, policies, tmp_path_factory):
    options = {"chunk_size": SIZE, "policies": policies, "vllm": {"load": request.param}}
    with Disk(tmp_path_factory.mktemp(request.param) / "store") as disk:
        engine = start(folders[1], tiers=[disk.url], **options)
        yield World(engine, disk, folders, manifests)
        engine.close()


def flip_end(file: Path) -> None:
    """The last layer's V."""
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def flip_e(file: Path) -> None:
    """The first rows after the header, which are those of E."""
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 100] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])


def remove(file: Path) -> None:
    file.unlink()


FAULTS = {
    "end": (flip_end, "corrupt"),
    "e": (flip_e, "corrupt"),
    "cut": (cut, "corrupt"),
    "gone": (remove, "evicted"),
}


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_chunks_of_the_sender(world, fault, chunk):
    number = 10 * list(FAULTS).index(fault) + chunk
    ids = prompt(number, LENGTH)
    damage, reason = FAULTS[fault]
    damage(world.send(ids)[chunk])
    answered = world.ask(ids, number)
    assert answered.status == ("fallback_reprefill", reason)
    assert answered.told["shared_tokens"] == answered.told["exact_tokens"] == 0
    assert answered.steps < FEW
    assert_said(answered, world.own(ids))


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("fault", ["end", "cut", "gone"])
def test_own_chunks_are_computed_and_saved_anew(world, fault, chunk):
    number = 200 + 10 * list(FAULTS).index(fault) + chunk
    ids = prompt(number, 300)
    damage, reason = FAULTS[fault]
    damage(world.send(ids[:LENGTH], own=True)[chunk])
    answered = world.ask(ids, number)
    assert answered.status == ("fallback_reprefill", reason)
    assert answered.steps < FEW
    assert_said(answered, world.own(ids))
    # The chunk after the broken ones was computed in the step in which the load failed.
    later = prompt(500 + number, SIZE)
    world.engine.ask(Request(later))
    world.disk.wait(keys_of(world.manifests[1], later, SIZE))
    world.disk.wait(keys_of(world.manifests[1], ids, SIZE))
    right = capture(load(world.folders[1]), torch.tensor(ids))
    assert_near(stored(world.disk.tier, keys_of(world.manifests[1], ids, SIZE)), right)
    assert world.engine.forget()
    (again,) = world.engine.ask(Request(ids))
    assert (again.status, again.cached) == (("applied", "exact_hit"), 256)
    assert_said(again, world.own(ids))


# --- a store that goes away ---


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    folder = tmp_path_factory.mktemp("daemon") / "store"
    daemon = Daemon(folder)
    try:
        with Disk(folder) as disk, Wire(daemon.port) as wire:
            yield disk, wire
    finally:
        daemon.kill()


@pytest.fixture(scope="module", params=["sync", "async"])
def remote(request, start, folders, manifests, policies, daemon):
    """A world whose store is behind a wire."""
    disk, wire = daemon
    with start(
        folders[1],
        role="kv_consumer",
        tiers=[f"droidspeak://127.0.0.1:{wire.port}"],
        chunk_size=SIZE,
        policies=policies,
        load_deadline=2.0,
        limits={"remote": {"read_deadline": 5.0, "cooldown": 0.1, "max_cooldown": 0.1}},
        vllm={"load": request.param},
    ) as engine:
        yield World(engine, disk, folders, manifests), wire, request.param


def mend(world: World, wire: Wire) -> None:
    """Returns when the engine has the store again."""
    wire.mend()
    unknown = (prompt(number, 100) for number in itertools.count(int(time.time() * 1000)))
    wait_for(lambda: world.engine.ask(Request(next(unknown), new=1))[0].status[1] == "miss", "the store")


@pytest.mark.parametrize("budget", [20_000, 150_000, 250_000])
@pytest.mark.parametrize("stalls", [False, True])
def test_a_store_that_goes_away_in_the_middle(remote, stalls, budget):
    world, wire, mode = remote
    number = 300 + budget // 10_000 + 100 * stalls + 200 * (mode == "async")
    ids, before = prompt(number, LENGTH), prompt(number + 1000, LENGTH)
    world.send(ids)
    world.send(before)
    assert world.ask(before, number).status == HIT
    wire.stalls, wire.budget = stalls, budget
    answered = world.ask(ids, number)
    mend(world, wire)
    reason = "timeout" if stalls else "store_unavailable"
    assert answered.status == ("fallback_reprefill", reason)
    # Steps between which it waits for the store are as many as that takes.
    assert answered.forwards < FEW
    assert_said(answered, world.own(ids))


def test_others_go_on_while_a_load_between_steps_waits(remote):
    world, wire, mode = remote
    if mode == "sync":
        pytest.skip("a load within the step is awaited")
    ids, other = prompt(720, LENGTH), prompt(721, 50)
    world.send(ids)
    wire.stalls, wire.budget = True, 150_000
    waiting, neighbour = world.engine.ask(Request(ids), Request(other, new=40, at=1))
    mend(world, wire)
    assert waiting.status == ("fallback_reprefill", "timeout")
    assert neighbour.steps < FEW < waiting.steps
    assert_said(neighbour, answer(load(world.folders[1]), other, new=40))


def test_a_request_that_is_given_up_while_it_is_loaded(remote):
    world, wire, mode = remote
    ids, other = prompt(700 + len(mode), LENGTH), prompt(710, 100)
    world.send(ids)
    wire.stalls, wire.budget = True, 150_000
    neighbour, given_up = world.engine.ask(Request(other, new=12), Request(ids, at=1, abort=3))
    mend(world, wire)
    assert_said(neighbour, answer(load(world.folders[1]), other, new=12))
    assert given_up.finish == "given up"
    assert world.engine.forget(), "blocks of the request are lost"

"""Memory of loads: used again when nothing refers to it, and never before."""

from __future__ import annotations

import gc
import threading
from itertools import repeat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.connector import Connector, ConnectorOptions
from droidspeak.connector.memory import LoadMemory
from droidspeak.errors import ConfigError, LoadFailed
from droidspeak.storage import Slot
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.wrappers import FaultyTier

from .models import LAYERS, SIZE, fill, model, prompt, rows

MIB = 1 << 20
ME, IDS = model("me"), prompt(5)


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def floats(memory: LoadMemory, count: int) -> torch.Tensor:
    return memory.lease([4 * count]).tensor((count,), torch.float32)


def test_what_is_let_go_is_used_again():
    memory = LoadMemory(4 * MIB)
    first = floats(memory, 1000)
    place = address(first)
    assert address(floats(memory, 1000)) != place
    view = first[10:20].view(2, 5)
    del first
    # Somebody may still read, or write, what a view shows.
    assert address(floats(memory, 1000)) != place
    del view
    assert address(floats(memory, 1000)) == place


def test_tensors_of_one_lease_do_not_touch():
    lease = LoadMemory(MIB).lease([12, 0, 7, 4000])
    tensors = [
        lease.tensor((3,), torch.float32),
        lease.tensor((0, 5), torch.bfloat16),
        lease.tensor((7,), torch.uint8),
        lease.tensor((2, 1000), torch.float16),
    ]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
        assert tensor.data_ptr() % 4 == 0
    assert [set(tensor.flatten().tolist()) for tensor in tensors] == [{0}, set(), {2}, {3}]
    beyond = lease.tensor((3,), torch.float32)
    assert address(beyond) != address(tensors[0])


@pytest.mark.parametrize("keep", [0, MIB])
def test_no_more_is_kept_than_allowed(keep):
    memory = LoadMemory(keep)
    large = floats(memory, MIB)
    small = floats(memory, 10)
    assert memory.kept == keep
    del small
    assert large.numel() == MIB
    assert floats(memory, 10).numel() == 10
    assert memory.kept == keep


def test_free_blocks_make_room_for_a_larger_one():
    memory = LoadMemory(4 * MIB)
    blocks = [floats(memory, MIB // 4) for _ in range(4)]
    assert memory.kept == 4 * MIB
    del blocks[1:]
    large = floats(memory, MIB // 2)
    assert memory.kept == 4 * MIB
    assert large.numel() == MIB // 2
    del large, blocks
    # One that cannot be had is no reason to throw others away.
    floats(memory, 2 * MIB)
    assert memory.kept == 4 * MIB


@given(st.lists(st.tuples(st.integers(1, 3 * MIB), st.integers(0, 3)), max_size=12))
def test_nothing_that_is_in_use_is_given_twice(steps):
    memory = LoadMemory(8 * MIB)
    held: dict[int, torch.Tensor] = {}
    for number, (nbytes, dropped) in enumerate(steps):
        held[number] = memory.lease([nbytes]).tensor((nbytes,), torch.uint8)
        held[number][[0, -1]] = number
        held.pop(number - dropped, None)
        assert all(set(tensor[[0, -1]].tolist()) == {name} for name, tensor in held.items())
        assert memory.kept <= 8 * MIB


def test_it_must_not_be_negative():
    with pytest.raises(ConfigError, match="load memory of -1 bytes: allowed are 0 and positive numbers"):
        ConnectorOptions(load_memory=-1)


def load_all(connector: Connector) -> list[torch.Tensor]:
    with connector.load(connector.lookup(IDS, ME)) as stream:
        return [tensor for layer in range(LAYERS) for tensor in stream.kv(layer)]


def test_loads_use_it_again_unless_the_engine_keeps_what_it_got(tmp_path):
    with DiskTier(tmp_path, min_free=0) as store:
        fill(store, ME, IDS)
        connector = Connector(store, options=ConnectorOptions(chunk_size=SIZE))
        kept = load_all(connector)
        places = {address(tensor) for tensor in kept}
        others = load_all(connector)
        assert {address(tensor) for tensor in others}.isdisjoint(places)
        for tensor in others:
            tensor.zero_()
        want = [rows(ME, slot, 5 * SIZE) for layer in range(LAYERS) for slot in Slot.kv([layer])]
        assert all(map(torch.equal, kept, want))
        del kept, others, tensor
        gc.collect()
        assert {address(tensor) for tensor in load_all(connector)} <= places
        connector.close()


def gives_up(connector: Connector) -> None:
    with pytest.raises(LoadFailed), connector.load(connector.lookup(IDS, ME)) as stream:
        stream.kv(0)


def test_a_read_that_is_late_keeps_its_memory(tmp_path):
    answered = threading.Event()

    def late(call):
        chunk = call()
        assert answered.wait(30)
        return chunk

    with DiskTier(tmp_path, min_free=0) as disk:
        fill(disk, ME, IDS)
        slow = FaultyTier(disk, {"read": repeat(late)})
        connector = Connector(slow, options=ConnectorOptions(chunk_size=SIZE, load_deadline=0.05))
        gives_up(connector)
        gc.collect()
        (block,) = connector._memory._blocks
        assert not block.free
        answered.set()
        for thread in threading.enumerate():
            if thread.name.startswith("droidspeak-load"):
                thread.join(30)
        gc.collect()
        assert block.free
        connector.close()

"""The parts of the plug-ins that need no engine."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from droidspeak.integrations.lmcache_plugin.assembly import Assembly
from droidspeak.integrations.lmcache_plugin.holds import Holds
from droidspeak.integrations.lmcache_plugin.objects import Expected, Layout, Naming, lend, tensors
from droidspeak.integrations.lmcache_plugin.tally import Tally
from droidspeak.storage.objects import object_key

ONE, TWO, THREE = (object_key("test", "owner", name) for name in (b"1", b"2", b"3"))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Item:
    name: str
    nbytes: int = 10


@dataclass
class Forgotten:
    told: list = field(default_factory=list)

    def __call__(self, reason, items) -> None:
        self.told.append((reason, [item.name for item in items]))


def assembly(forgotten, capacity=100, clock=None) -> Assembly:
    return Assembly(3, capacity, 60.0, forgotten, clock or Clock())


def test_layers_come_out_when_the_last_has_come_whatever_their_order():
    waiting = assembly(forgotten := Forgotten())
    assert waiting.add(ONE, 2, Item("c")) is None
    assert waiting.add(ONE, 0, Item("a")) is None
    assert waiting.add(ONE, 0, Item("again")) is None
    assert waiting.holds(ONE, 2)
    assert not waiting.holds(ONE, 1)
    assert [item.name for item in waiting.add(ONE, 1, Item("b"))] == ["a", "b", "c"]
    assert not waiting.holds(ONE, 2)
    assert forgotten.told == []


def test_the_oldest_chunk_is_forgotten_for_room():
    waiting = assembly(forgotten := Forgotten(), capacity=45)
    for layer in (0, 1):
        for key in (ONE, TWO):
            waiting.add(key, layer, Item(f"{layer}"))
    waiting.add(THREE, 0, Item("0"))
    assert forgotten.told == [("no_room", ["0", "1"])]
    assert not waiting.holds(ONE, 0)
    assert [item.name for item in waiting.add(TWO, 2, Item("2"))] == ["0", "1", "2"]
    # Its bytes no longer count.
    waiting.add(ONE, 0, Item("0", 34))
    assert len(forgotten.told) == 1


def test_chunks_are_forgotten_after_a_while():
    clock = Clock()
    waiting = assembly(forgotten := Forgotten(), clock=clock)
    waiting.add(ONE, 0, Item("a"))
    clock.now = 30
    waiting.add(TWO, 0, Item("b"))
    waiting.add(ONE, 1, Item("c"))
    clock.now = 60
    waiting.sweep()
    assert forgotten.told == [("incomplete", ["a", "c"])]
    waiting.clear()
    assert forgotten.told[1:] == [("incomplete", ["b"])]


class MemoryObject:
    """Counts references as LMCache's does."""

    def __init__(self, nbytes: int = 64) -> None:
        self.references = 1
        self._memory = bytearray(nbytes)
        self._pointer = (ctypes.c_ubyte * nbytes).from_buffer(self._memory)

    @property
    def byte_array(self) -> memoryview:
        # A new object over the same memory each time, as LMCache's is.
        address = ctypes.addressof(self._pointer)
        return memoryview((ctypes.c_ubyte * len(self._memory)).from_address(address))

    def ref_count_up(self) -> None:
        self.references += 1

    def ref_count_down(self) -> None:
        self.references -= 1


def test_holds_end_with_their_last_pin():
    holds, obj = Holds(60.0, Clock()), MemoryObject()
    assert not holds.pin(ONE, 1)
    holds.add(ONE, [obj], 2)
    assert holds.pin(ONE, 1)
    (taken,) = holds.take(ONE, [0])
    assert (taken, obj.references) == (obj, 2)
    assert [holds.unpin(ONE) for _ in range(4)] == [True, True, True, False]
    assert obj.references == 1
    assert holds.take(ONE, [0]) is None


def test_what_was_read_twice_is_held_once():
    holds, obj, same = Holds(60.0, Clock()), MemoryObject(), MemoryObject()
    holds.add(ONE, [obj], 1)
    holds.add(ONE, [same], 1)
    assert (obj.references, same.references) == (1, 0)
    holds.clear()
    assert obj.references == 0


def test_pins_that_nobody_takes_back_end():
    clock = Clock()
    holds, obj = Holds(60.0, clock), MemoryObject()
    holds.add(ONE, [obj], 1)
    clock.now = 30
    holds.pin(ONE, 1)
    clock.now = 89
    holds.sweep()
    assert len(holds) == 1
    clock.now = 90
    holds.sweep()
    assert (len(holds), obj.references) == (0, 0)


def test_a_lent_object_comes_back_with_the_last_tensor_over_it():
    obj = MemoryObject()
    layout = Layout("KV_T2D", ((torch.bfloat16, (2, 8)), (torch.int8, (32,))))
    one, two = tensors(lend(obj), layout)
    assert (one.dtype, two.dtype, obj.references) == (torch.bfloat16, torch.uint8, 2)
    row = one[1]
    del one, two
    gc.collect()
    assert obj.references == 2
    row.fill_(1.0)
    assert (
        bytes(obj.byte_array)[16:20]
        == torch.ones(2, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    )
    del row
    gc.collect()
    assert obj.references == 1


def test_layouts_come_back_from_their_text():
    layout = Layout("KV_2LTD", ((torch.bfloat16, (2, 4, 64, 8)), (torch.float8_e4m3fn, (2, 1, 64, 8))))
    assert Layout.parse(str(layout)) == layout
    assert layout.nbytes == 2 * 4 * 64 * 8 * 2 + 2 * 64 * 8


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '["KV_2LTD", [["bfloat17", [1]]]]', '["KV_2LTD", [["nn", [1]]]]', '["A", [[1, [2]]]]'],
)
def test_other_text_is_no_layout(text):
    with pytest.raises(ValueError):
        Layout.parse(text)


def metadata(**other) -> SimpleNamespace:
    values = {"kv_shape": (4, 2, 64, 2, 32), "chunk_size": 64, "use_mla": False, "kv_dtype": torch.bfloat16}
    values |= other
    heads = values["kv_shape"][3] * values["kv_shape"][4]
    shape = (values["kv_shape"][1], values["kv_shape"][0])
    return SimpleNamespace(
        **values,
        get_shapes=lambda tokens: [torch.Size((*shape, tokens, heads))],
        get_dtypes=lambda: [values["kv_dtype"]],
    )


@pytest.mark.parametrize(
    ("fmt", "dtype", "shape", "fits"),
    [
        ("KV_2LTD", torch.bfloat16, (2, 4, 64, 64), True),
        ("KV_2LTD", torch.bfloat16, (2, 4, 7, 64), True),
        ("KV_2LTD", torch.bfloat16, (2, 4, 65, 64), False),
        ("KV_2LTD", torch.bfloat16, (2, 4, 0, 64), False),
        ("KV_2LTD", torch.float16, (2, 4, 64, 64), False),
        ("KV_2LTD", torch.bfloat16, (2, 5, 64, 64), False),
        ("KV_2LTD", torch.bfloat16, (2, 4), False),
        ("KV_T2D", torch.bfloat16, (64, 2, 64), False),
        ("EC_TD", torch.float32, (3, 100), True),
    ],
)
def test_whole_objects_that_an_engine_can_use(fmt, dtype, shape, fits):
    fault = Expected(metadata()).fault(Layout(fmt, ((dtype, shape),)), layered=False)
    assert (fault is None) == fits, fault


@pytest.mark.parametrize(
    ("fmt", "shape", "layers", "fits"),
    [
        ("KV_T2D", (64, 2, 64), 4, True),
        ("KV_T2D", (9, 2, 64), 4, True),
        ("KV_T2D", (64, 2, 64), 3, False),
        ("KV_T2D", (64, 2, 32), 4, False),
        ("KV_2TD", (2, 64, 64), 4, False),
    ],
)
def test_layers_that_an_engine_can_use(fmt, shape, layers, fits):
    layout = Layout(fmt, ((torch.bfloat16, shape),) * layers)
    assert (Expected(metadata()).fault(layout, layered=True) is None) == fits


def test_layers_of_latent_attention_and_of_blending():
    latent = Layout("KV_T2D", ((torch.bfloat16, (64, 64)),) * 4)
    assert Expected(metadata(use_mla=True)).fault(latent, layered=True) is None
    blended = Layout("KV_2TD", ((torch.bfloat16, (2, 64, 64)),) * 4)
    assert Expected(metadata(), "KV_2TD").fault(blended, layered=True) is None


def lmcache_key(**other) -> SimpleNamespace:
    values = {
        "model_name": "org/model",
        "world_size": 2,
        "worker_id": 1,
        "chunk_hash": 255,
        "chunk_hash_hex": "ff",
        "dtype": torch.bfloat16,
        "tags": None,
    }
    return SimpleNamespace(**values | other)


def test_every_part_of_a_key_counts():
    naming = Naming((4, 2, 2, 32))
    keys = [
        naming.chunk_key(key)
        for key in (
            lmcache_key(),
            lmcache_key(model_name="org/other"),
            lmcache_key(worker_id=0),
            lmcache_key(chunk_hash=254, chunk_hash_hex="fe"),
            lmcache_key(chunk_hash=b"\xff"),
            lmcache_key(dtype=torch.float16),
            lmcache_key(tags=(("user", "a"),)),
            lmcache_key(tags=(("user", "a@b%c"),)),
            lmcache_key(tags=(("user", "a"), ("b", "c"))),
            lmcache_key(layer_id=0),
        )
    ]
    others = [Naming((4, 2, 2, 64)), Naming((4, 2, 2, 32), "weights"), Naming((4, 2, 2, 32), salt="weights")]
    keys += [naming.chunk_key(lmcache_key()) for naming in others]
    assert len(set(keys)) == len(keys)
    assert keys[0].shard == "1of2"


def test_all_layers_of_a_chunk_are_one_chunk():
    naming = Naming()
    assert naming.chunk_key(lmcache_key(layer_id=3)) == naming.chunk_key(lmcache_key(layer_id=0))


def test_failures_are_counted_and_told_now_and_then(caplog):
    clock = Clock()
    tally = Tally("plug-in", interval=30.0, clock=clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tally.failed("misses", "corrupt", "chunk one")
        clock.now = 31
        tally.failed("not_stored", "full", "chunk two")
    assert caplog.messages == [
        "plug-in: misses: corrupt: chunk one",
        "plug-in: not stored: full: chunk two (and 2 other failures since the last such line)",
    ]
    assert json.loads(json.dumps(tally.counters.snapshot())) == {
        "misses": {"corrupt": 3},
        "not_stored": {"full": 1},
    }

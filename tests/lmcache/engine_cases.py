"""Cases for the real LMCache engine with our plug-ins; `test_engine` runs each phase as a process.

python engine_cases.py PHASE FOLDER      prints one JSON line {case: "ok" or what went wrong},
                                         and kills itself: LMCache's threads would keep it
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from cpu_engine import Engine, same, tokens_of

from droidspeak.errors import LoadFailed
from droidspeak.storage.objects import object_chunk
from droidspeak.storage.wrappers import WrapperTier

CHUNK = 64
CHUNKS = 4
COUNT = CHUNK * CHUNKS
CLASSES = {"storage": "DroidSpeakStorage", "remote": "DroidSpeakConnectorAdapter"}


@dataclass(frozen=True)
class Mode:
    """A kind of plug-in, and whether the engine works layer by layer."""

    kind: str
    layerwise: bool

    def __str__(self) -> str:
        return f"{self.kind}-{'layers' if self.layerwise else 'whole'}"

    def config(self, folder: Path, tiers: list[str], buffer_gb: float = 0.05, **options) -> str:
        """Path of a configuration as LMCache's users write it."""
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "storage_plugin" if self.kind == "storage" else "remote_storage_plugin"
        ours = {
            "module_path": f"droidspeak.integrations.lmcache_plugin.{self.kind}",
            "class_name": CLASSES[self.kind],
            "tiers": tiers,
            **options,
        }
        config = {
            "chunk_size": CHUNK,
            "local_cpu": False,
            "max_local_cpu_size": buffer_gb,
            "use_layerwise": self.layerwise,
            f"{prefix}s": ["droidspeak"],
            "extra_config": {f"{prefix}.droidspeak.{key}": value for key, value in ours.items()},
        }
        path = folder / f"{self}.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)


STORAGE_WHOLE, STORAGE_LAYERS = Mode("storage", False), Mode("storage", True)
REMOTE_WHOLE, REMOTE_LAYERS = Mode("remote", False), Mode("remote", True)
ALL = [STORAGE_WHOLE, STORAGE_LAYERS, REMOTE_WHOLE, REMOTE_LAYERS]


def disk(folder: Path, capacity: str = "64MiB") -> str:
    return f"disk://{folder}?capacity={capacity}"


def stored(engine: Engine, tokens=None, seed: int = 1):
    """Stores `tokens` with KV by `seed` and waits until all is on disk; tokens and KV."""
    tokens = tokens_of(COUNT) if tokens is None else tokens
    kv = engine.kv(seed)
    engine.store(tokens, kv)
    flush(engine)
    return tokens, kv


def flush(engine: Engine) -> None:
    """Waits until all puts have come to us, and are in all tiers."""
    for backend in engine.backends.values():
        until(lambda backend=backend: not getattr(backend, "put_tasks", None))
    exchange = engine.plugin._exchange
    assert exchange.flush(30)
    assert exchange.store.flush(30)


def chunk_keys(engine: Engine, tokens) -> list:
    """Keys of the chunks of `tokens` in our store."""
    found = []
    for _, _, key in engine.engine.token_database.process_tokens(tokens=tokens):
        one = key.split_layers(engine.layers)[0] if engine.layerwise else key
        found.append(engine.plugin._exchange.chunk_key(one))
    return found


def file_of(folder: Path, key) -> Path:
    (path,) = folder.rglob(f"{key.prefix}.safetensors")
    return path


def check_retrieve(engine: Engine, tokens, kv, count: int) -> None:
    """The engine says `count` tokens, and these, and only these, are loaded."""
    into = engine.kv()
    got = engine.retrieve(tokens, into)
    assert got == count, f"{got} tokens, not {count}"
    assert same(kv, into, count), "other KV than was stored"
    assert all(not layer[:, count:].any() for layer in into), "more than it says"


def check_nothing_kept(engine: Engine, free: int) -> None:
    gc.collect()
    assert engine.free_bytes() == free, f"{free - engine.free_bytes()} bytes of the buffer are kept"


# Phase "store"


def store_and_retrieve(mode: Mode, folder: Path) -> None:
    tiers = ["cpu://?capacity=8MiB", disk(folder / "store")]
    engine = Engine(mode.config(folder, tiers), instance=f"sr-{mode}")
    free = engine.free_bytes()
    tokens, kv = stored(engine)
    check_nothing_kept(engine, free)
    assert engine.lookup(tokens, "r") == COUNT
    into = engine.kv()
    assert engine.retrieve(tokens, into, "r") == COUNT
    assert same(kv, into, COUNT)
    engine.engine.lookup_unpin("r")
    # Another tail: the chunks before it.
    other = tokens.clone()
    other[2 * CHUNK + 5] += 1
    assert engine.lookup(other) == 2 * CHUNK
    check_retrieve(engine, other[: 2 * CHUNK] if mode.layerwise else other, kv, 2 * CHUNK)
    check_nothing_kept(engine, free)
    # The second time nothing is written: it is there.
    before = engine.plugin.report()
    engine.store(tokens, kv)
    flush(engine)
    assert engine.plugin.report()["plugin"]["stored"] == before["plugin"]["stored"]
    assert engine.plugin.report()["tiers"]["disk"]["chunks"] == CHUNKS
    if mode.kind == "storage":
        assert engine.plugin.report()["held"] == 0
        # A lookup that has no time left promises nothing.
        engine.plugin._deadline = -1.0
        assert engine.lookup(tokens, "late") == 0
        assert set(engine.plugin.report()["plugin"]["misses"]) == {"late"}
    engine.close()


def small_store(mode: Mode, folder: Path) -> None:
    """A store with room for three chunks of sixteen: what it has is right, what it has not is no hit."""
    engine = Engine(mode.config(folder, [disk(folder / "store", "210KB")]), instance=f"small-{mode}")
    free = engine.free_bytes()
    for seed in range(4):
        stored(engine, tokens_of(COUNT, seed), seed + 1)
    found = 0
    for seed in range(4):
        tokens, kv = tokens_of(COUNT, seed), engine.kv(seed + 1)
        count = engine.lookup(tokens, f"r{seed}")
        if count:
            check_retrieve(engine, tokens[:count], kv, count)
        engine.engine.lookup_unpin(f"r{seed}")
        found += count
    usage = engine.plugin.report()["tiers"]["disk"]
    assert usage["chunks"] == 3, usage
    assert found <= 3 * CHUNK, found
    check_nothing_kept(engine, free)
    engine.close()


def identities(mode: Mode, folder: Path) -> None:
    """Models of other names, weights, salts and shapes do not meet; the same ones do."""
    tiers = [disk(folder / "store")]

    def lookup(name: str, *, model: str = "org/model", layers: int = 4, **options) -> int:
        path = mode.config(folder / name, tiers, **options)
        engine = Engine(path, model=model, layers=layers, instance=f"id-{mode}-{name}")
        count = engine.lookup(tokens_of(COUNT))
        engine.close()
        return count

    first = Engine(mode.config(folder, tiers, identity="weights-1"), instance=f"id-{mode}")
    stored(first)
    first.close()
    assert lookup("same", identity="weights-1") == COUNT
    assert lookup("plain") == 0
    assert lookup("weights", identity="weights-2") == 0
    assert lookup("salt", identity="weights-1", salt="tenant") == 0
    assert lookup("model", identity="weights-1", model="org/other") == 0
    assert lookup("layers", identity="weights-1", layers=3) == 0


def small_buffer(mode: Mode, folder: Path) -> None:
    """A lookup promises no more than LMCache's buffer can take."""
    tiers = [disk(folder / "store")]
    tokens = tokens_of(16 * CHUNK)
    big = Engine(mode.config(folder / "big", tiers), instance=f"big-{mode}")
    tokens, kv = stored(big, tokens)
    big.close()
    small = Engine(mode.config(folder / "small", tiers, buffer_gb=0.0004), instance=f"small-buffer-{mode}")
    free = small.free_bytes()
    count = small.lookup(tokens, "r")
    assert 0 < count < 16 * CHUNK, count
    assert set(small.plugin.report()["plugin"]["misses"]) == {"no_room"}
    check_retrieve(small, tokens[:count], kv, count)
    small.engine.lookup_unpin("r")
    check_nothing_kept(small, free)
    small.close()


def incomplete_chunk(mode: Mode, folder: Path) -> None:
    """Layers that never all come are not there, and do not keep the buffer for ever."""
    path = mode.config(folder, ["cpu://?capacity=8MiB"], assembly_timeout=600)
    engine = Engine(path, instance=f"incomplete-{mode}")
    free = engine.free_bytes()
    tokens, kv = tokens_of(COUNT), engine.kv(1)
    storing = engine.engine.store_layer(
        tokens, kvcaches=kv, slot_mapping=torch.arange(COUNT), sync=True, req_id="s"
    )
    for _ in range(3):
        next(storing)
    storing.close()
    del storing
    assert engine.lookup(tokens) == 0
    gc.collect()
    assert engine.free_bytes() < free
    assembly = engine.plugin._exchange._putting._assembly
    clock, assembly._clock = assembly._clock, lambda: time.monotonic() + 601
    assert engine.lookup(tokens) == 0
    assembly._clock = clock
    check_nothing_kept(engine, free)
    assert engine.plugin.report()["plugin"]["not_stored"] == {"incomplete": CHUNKS}
    # The same chunks may come again, complete.
    stored(engine, tokens)
    check_retrieve(engine, tokens, kv, COUNT)
    engine.close()


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        gc.collect()
        time.sleep(0.05)


def pins_in_the_store(mode: Mode, folder: Path) -> None:
    """With `check: load` pins are the store's, counted by lookup, and end with the last unpin."""
    path = mode.config(folder, ["cpu://?capacity=420KB"], check="load")
    engine = Engine(path, instance=f"pins-{mode}")
    tokens, kv = stored(engine)
    assert engine.lookup(tokens, "a") == engine.lookup(tokens, "b") == COUNT
    assert engine.plugin.report()["pinned"] == CHUNKS
    engine.engine.lookup_unpin("a")
    for seed in (5, 6):
        stored(engine, tokens_of(COUNT, seed), seed)
    assert engine.lookup(tokens) == COUNT, "pinned chunks were evicted"
    check_retrieve(engine, tokens, kv, COUNT)
    engine.engine.lookup_unpin("b")
    assert engine.plugin.report()["pinned"] == 0
    for seed in (7, 8):
        stored(engine, tokens_of(COUNT, seed), seed)
    assert engine.lookup(tokens) == 0, "unpinned chunks stay"
    engine.close()


def foreign_object(mode: Mode, folder: Path) -> None:
    """An object of another shape under the right key is a miss, and is taken away."""
    engine = Engine(mode.config(folder, ["cpu://?capacity=8MiB"]), instance=f"foreign-{mode}")
    tokens = tokens_of(COUNT)
    odd = torch.ones(2, 4, CHUNK, 2 * 32 + 8, dtype=torch.bfloat16)
    label = json.dumps(["KV_2LTD", [["bfloat16", list(odd.shape)]]])
    for key in chunk_keys(engine, tokens):
        engine.plugin._exchange.store.write(object_chunk(key, {0: odd}, labels={"lmcache": label}))
    if mode.kind == "storage":
        assert engine.lookup(tokens, "r") == 0
    else:
        assert engine.lookup(tokens, "r") == COUNT
        check_retrieve(engine, tokens, engine.kv(), 0)
    assert set(engine.plugin.report()["plugin"]["misses"]) == {"foreign"}
    assert engine.lookup(tokens) == 0
    engine.close()


def shared_store(mode: Mode, folder: Path) -> None:
    """Two engines of one configuration have one store, which lives as long as the last of them."""
    path = mode.config(folder, ["cpu://?capacity=8MiB"])
    one, two = (Engine(path, instance=f"shared-{mode}-{n}") for n in (1, 2))
    tokens, kv = stored(one)
    one.close()
    check_retrieve(two, tokens, kv, COUNT)
    two.close()
    three = Engine(path, instance=f"shared-{mode}-3")
    assert three.lookup(tokens) == 0
    three.close()


def load_ahead(mode: Mode, folder: Path) -> None:
    """As LMCache's `enable_async_loading` asks: a corrupt chunk ends the list, and nothing is kept."""
    engine = Engine(mode.config(folder, [disk(folder / "store")]), instance=f"ahead-{mode}")
    free = engine.free_bytes()
    tokens, _ = stored(engine)
    flip_last_byte(file_of(folder / "store", chunk_keys(engine, tokens)[2]))
    keys = [key for _, _, key in engine.engine.token_database.process_tokens(tokens=tokens)]
    if mode.layerwise:
        keys = [one for key in keys for one in key.split_layers(engine.layers)]
    backend = engine.backends["droidspeak"]

    def ask(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, engine.engine.storage_manager.loop).result(30)

    assert ask(backend.batched_async_contains("r", keys, pin=True)) == len(keys)
    got = ask(backend.batched_get_non_blocking("r", keys, {"cum_chunk_lengths": []}))
    assert len(got) == len(keys) // 2, len(got)
    for memory_obj in got:
        memory_obj.ref_count_down()
    check_nothing_kept(engine, free)
    check_one_by_one(engine, folder, tokens, keys)
    check_nothing_kept(engine, free)
    engine.close()


def check_one_by_one(engine: Engine, folder: Path, tokens, keys) -> None:
    """Single objects: one that is there, one that is damaged, one that is removed."""
    backend, first, second = engine.backends["droidspeak"], keys[0], keys[len(keys) // CHUNKS]
    backend.get_blocking(first).ref_count_down()
    flip_last_byte(file_of(folder / "store", chunk_keys(engine, tokens)[1]))
    last = keys[2 * len(keys) // CHUNKS - 1]
    try:
        assert backend.get_blocking(last) is None
        raised = None
    except LoadFailed as error:
        raised = error.reason
    assert raised == ("corrupt" if engine.layerwise else None)
    # It was taken away, so it is just not there.
    assert backend.get_blocking(second) is None
    assert backend.remove(first)
    assert not backend.contains(first)
    assert not backend.remove(first)


def scheduler(mode: Mode, folder: Path) -> None:
    """vLLM's scheduler has no buffer: its plug-in lists, holds nothing and loads nothing."""
    engine = Engine(mode.config(folder, ["cpu://?capacity=8MiB"]), instance=f"scheduler-{mode}")
    tokens, _ = stored(engine)
    ours = engine.plugin
    other = type(ours)("cpu", ours.config, ours.metadata, None, ours.loop)
    keys = [key for _, _, key in engine.engine.token_database.process_tokens(tokens=tokens)]
    assert other.batched_contains(keys, pin=True) == CHUNKS
    assert other.get_blocking(keys[0]) is None
    assert other.report()["plugin"] == {"misses": {"no_room": 1}}
    assert (other.report()["held"], other.report()["pinned"]) == (0, 0)
    other.close()
    assert engine.lookup(tokens) == COUNT
    engine.close()


def with_zstd(mode: Mode, folder: Path) -> None:
    path = mode.config(folder, [disk(folder / "store")], codec="zstd")
    engine = Engine(path, instance=f"zstd-{mode}")
    free = engine.free_bytes()
    tokens, kv = stored(engine)
    check_retrieve(engine, tokens, kv, COUNT)
    check_nothing_kept(engine, free)
    assert engine.plugin.report()["tiers"]["disk"]["nbytes"] < COUNT * 4 * 2 * 64 * 2
    engine.close()


def late_read(mode: Mode, folder: Path) -> None:
    """A read that overstays its deadline may still write: its memory is not LMCache's until it has ended."""
    path = mode.config(folder, [disk(folder / "store")], limits={"disk": {"read_deadline": 0.5}})
    engine = Engine(path, instance=f"late-{mode}")
    free = engine.free_bytes()
    tokens, _ = stored(engine)
    guard = engine.plugin._exchange.store.tiers[0]
    goes_on = threading.Event()
    guard.tier = SlowReads(guard.tier, goes_on)
    assert engine.lookup(tokens, "r") == 0
    gc.collect()
    kept = free - engine.free_bytes()
    assert kept > 0, "memory that is being written was given back"
    goes_on.set()
    until(lambda: engine.free_bytes() == free)
    assert "timeout" in engine.plugin.report()["plugin"]["misses"]
    engine.close()


class SlowReads(WrapperTier):
    """Reads only when `goes_on` is set."""

    def __init__(self, tier, goes_on: threading.Event) -> None:
        super().__init__(tier)
        self._goes_on = goes_on

    def read(self, key, slots=None, into=None):
        self._goes_on.wait()
        return self.tier.read(key, slots, into)


# What the phase "seed" leaves for the phase "restart". Both kinds of plug-in know the same objects.


def seed(mode: Mode, folder: Path) -> None:
    # Not closed: the process is killed.
    stored(Engine(mode.config(folder, [disk(folder / "store")]), instance=f"seed-{mode}"))


def restarted(mode: Mode, folder: Path, **options) -> Engine:
    """An engine on a copy of the store that another process has left."""
    seeds = folder.parent.parent / "seed" / str(STORAGE_LAYERS if mode.layerwise else STORAGE_WHOLE)
    shutil.copytree(seeds / "store", folder / "store")
    path = mode.config(folder, [disk(folder / "store")], **options)
    return Engine(path, instance=f"{mode}-{folder.parent.name}")


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def restart(mode: Mode, folder: Path) -> None:
    engine = restarted(mode, folder)
    free = engine.free_bytes()
    tokens, kv = tokens_of(COUNT), engine.kv(1)
    assert engine.lookup(tokens, "r") == COUNT
    check_retrieve(engine, tokens, kv, COUNT)
    engine.engine.lookup_unpin("r")
    check_nothing_kept(engine, free)
    engine.close()


DAMAGES = {
    "flipped": flip_last_byte,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "missing": lambda path: path.unlink(),  # the catalog does not know
}


def damaged(mode: Mode, folder: Path) -> None:
    """The third chunk is damaged: two chunks are used, and no more is ever reported."""
    engine = restarted(mode, folder)
    free = engine.free_bytes()
    tokens, kv = tokens_of(COUNT), engine.kv(1)
    for name, damage in DAMAGES.items():
        damage(file_of(folder / "store", chunk_keys(engine, tokens)[2]))
        found = engine.lookup(tokens, name)
        if mode.kind == "storage":
            assert found == 2 * CHUNK, f"{name}: {found}"
            check_retrieve(engine, tokens[:found], kv, 2 * CHUNK)
        elif mode.layerwise:
            assert found == COUNT, f"{name}: {found}"
            check_refused(engine, tokens)
        else:
            check_retrieve(engine, tokens, kv, 2 * CHUNK)
        engine.engine.lookup_unpin(name)
        check_nothing_kept(engine, free)
        # What is damaged has been taken away: the next lookup knows, and it can be stored again.
        assert engine.lookup(tokens) == 2 * CHUNK, name
        stored(engine, tokens)
        check_retrieve(engine, tokens, kv, COUNT)
    misses = engine.plugin.report()["plugin"]["misses"]
    assert set(misses) == {"corrupt", "absent"}, misses
    engine.close()


def check_refused(engine: Engine, tokens) -> None:
    """The engine was told of more than can be read: it must raise, and not count it as retrieved."""
    try:
        got = engine.retrieve(tokens, engine.kv())
    except (AttributeError, LoadFailed):
        return
    raise AssertionError(f"{got} tokens are said to be there")


def between(mode: Mode, folder: Path) -> None:
    """All files go between lookup and retrieve: what a storage plug-in has promised is in hand."""
    engine = restarted(mode, folder)
    tokens, kv = tokens_of(COUNT), engine.kv(1)
    assert engine.lookup(tokens, "r") == COUNT
    for path in (folder / "store").rglob("*.safetensors"):
        path.unlink()
    if mode.kind == "storage":
        check_retrieve(engine, tokens, kv, COUNT)
    elif mode.layerwise:
        check_refused(engine, tokens)
    else:
        check_retrieve(engine, tokens, kv, 0)
    engine.engine.lookup_unpin("r")
    assert engine.lookup(tokens, "again") == 0
    engine.close()


def middle(mode: Mode, folder: Path) -> None:
    """The store is lost after the second layer: the engine raises; it never says that all is there."""
    options = {"check": "load"} if mode.kind == "storage" else {}
    engine = restarted(mode, folder, **options)
    free = engine.free_bytes()
    tokens = tokens_of(COUNT)
    assert engine.lookup(tokens, "r") == COUNT
    retrieving = engine.engine.retrieve_layer(
        tokens, kvcaches=engine.kv(), slot_mapping=torch.arange(COUNT), sync=True, req_id="r"
    )
    masks = [next(retrieving), next(retrieving)]
    for path in (folder / "store").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:2000])
    try:
        masks += list(retrieving)
    except (AttributeError, LoadFailed) as error:
        raised = getattr(error, "reason", "remote")
    else:
        raise AssertionError("the engine has not noticed")
    del retrieving
    assert raised == ("corrupt" if mode.kind == "storage" else "remote")
    assert not any(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in masks)
    engine.engine.lookup_unpin("r")
    check_nothing_kept(engine, free)
    engine.close()


STORAGE = [STORAGE_WHOLE, STORAGE_LAYERS]
PHASES = {
    "store": [
        (store_and_retrieve, ALL),
        (small_store, STORAGE),
        (identities, [STORAGE_WHOLE]),
        (foreign_object, [STORAGE_WHOLE, REMOTE_WHOLE]),
        (small_buffer, STORAGE),
        (incomplete_chunk, [STORAGE_LAYERS]),
        (pins_in_the_store, STORAGE),
        (shared_store, [STORAGE_WHOLE, REMOTE_LAYERS]),
        (load_ahead, STORAGE),
        (scheduler, [STORAGE_WHOLE]),
        (late_read, [STORAGE_WHOLE]),
        (with_zstd, [STORAGE_WHOLE, REMOTE_LAYERS]),
    ],
    "seed": [(seed, STORAGE)],
    "restart": [
        (restart, ALL),
        (damaged, ALL),
        (between, ALL),
        (middle, [STORAGE_LAYERS, REMOTE_LAYERS]),
    ],
}


def run(phase: str, folder: Path) -> dict[str, str]:
    report = {}
    for case, modes in PHASES[phase]:
        for mode in modes:
            name, began = f"{case.__name__} {mode}", time.monotonic()
            try:
                case(mode, folder / case.__name__ / str(mode))
                report[name] = "ok"
            except Exception:  # noqa: BLE001 - it goes into the report
                report[name] = traceback.format_exc(limit=-4)
                Engine.close_all()
            print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    return report


if __name__ == "__main__":
    print("REPORT " + json.dumps(run(sys.argv[1], Path(sys.argv[2]))), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

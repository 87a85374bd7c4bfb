"""The disk tier: conformance, killed processes, shared folders, damage, room, byte counts."""

from __future__ import annotations

import errno
import inspect
import multiprocessing
import os
import random
import resource
import shutil
import signal
import textwrap
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open

from droidspeak.errors import ChunkCorrupt, TierFull, TierUnavailable
from droidspeak.storage.catalog import Catalog, PendingWrite
from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.testing import TierConformance, TierStateMachine, assert_holds, make_chunk, make_key
from droidspeak.storage.tier import TierUsage

SIZE = make_chunk(0).header.nbytes


class DiskHooks:
    persistent = True
    bounded = True
    reads_ranges = True

    def make_tier(self, place: Path, capacity: int | None = None) -> DiskTier:
        return DiskTier(place, capacity=capacity, min_free=0)

    def get_bytes(self, tier: DiskTier, key: ChunkKey) -> bytes | None:
        return tier.path(key).read_bytes() if tier.path(key).exists() else None

    def put_bytes(self, tier: DiskTier, key: ChunkKey, data: bytes) -> None:
        tier.path(key).write_bytes(data)

    def drop(self, tier: DiskTier, key: ChunkKey) -> None:
        tier.path(key).unlink()


class TestDiskTier(DiskHooks, TierConformance):
    pass


class DiskMachine(DiskHooks, TierStateMachine):
    pass


class SmallDiskMachine(DiskHooks, TierStateMachine):
    capacity = 3 * SIZE

    def make_tier(self, place: Path, capacity: int | None = None) -> DiskTier:
        return DiskTier(place, capacity=capacity, min_free=0, eviction="s3-fifo")


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestSmallDiskMachine = SmallDiskMachine.TestCase
TestSmallDiskMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def tier(root: Path) -> Iterator[DiskTier]:
    with DiskTier(root, min_free=0) as tier:
        yield tier


def files(root: Path) -> list[Path]:
    return [path for path in (root / "chunks").rglob("*") if path.is_file()]


def held(tier: DiskTier) -> set[int]:
    seeds = {make_key(seed): seed for seed in range(100)}
    return {seeds[key] for key in list(tier.keys())}


# Processes. A child is forked from a server that has the imports done, and runs one function's source.

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["droidspeak.storage.disk", "droidspeak.storage.testing"])


class Child:
    def __init__(self, work: Callable[..., None], *args: object) -> None:
        self.pipe, theirs = _FORKED.Pipe()
        code = f"{textwrap.dedent(inspect.getsource(work))}\n{work.__name__}(pipe, *args)"
        self.process = _FORKED.Process(target=exec, args=(code, {"pipe": theirs, "args": args}))
        self.process.start()
        theirs.close()

    def heard(self) -> list[object]:
        """All that the child said until it ended."""
        said = []
        try:
            while True:
                said.append(self.pipe.recv())
        except (EOFError, ConnectionResetError):
            self.process.join()
            self.pipe.close()
            return said


def write_in_a_loop(pipe, root, first):
    import itertools

    from droidspeak.storage.disk import DiskTier
    from droidspeak.storage.testing import make_chunk

    tier = DiskTier(root, min_free=0)
    for seed in itertools.count(first):
        tier.write(make_chunk(seed, tokens=256))
        pipe.send(seed)


def test_kill_at_any_moment_loses_no_acknowledged_chunk(root):
    source = random.Random(7)
    acknowledged: list[int] = []
    for round_ in range(8):
        child = Child(write_in_a_loop, root, 1_000 * round_)
        acknowledged.append(child.pipe.recv())
        time.sleep(source.random() * 0.08)
        child.process.kill()
        acknowledged += child.heard()
        with DiskTier(root, min_free=0) as tier:
            keys = {make_key(seed): seed for seed in acknowledged}
            assert keys.keys() <= set(tier.keys())
            assert len(keys) <= tier.usage().chunks <= len(keys) + round_ + 1
            assert sorted(files(root)) == sorted(tier.path(key) for key in list(tier.keys()))
            for key in list(tier.keys()):
                chunk = tier.read(key)
                if key in keys:
                    assert_holds(chunk, make_chunk(keys[key], tokens=256))
            assert tier._catalog.writes() == []
    assert len(acknowledged) > 8


def die_at(pipe, root, capacity, moment):
    import os
    import signal

    from droidspeak.storage import chunkfolder
    from droidspeak.storage.catalog import Catalog
    from droidspeak.storage.disk import DiskTier
    from droidspeak.storage.testing import make_chunk, make_key

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    tier = DiskTier(root, capacity=capacity, min_free=0)
    if moment == "before the temp file":
        chunkfolder.write_file.__globals__["os"].open = die
    elif moment == "half written":
        writev = os.writev
        os.writev = lambda file, buffers: (writev(file, buffers[:3]), die())
    elif moment == "before the rename":
        os.replace = die
    elif moment == "after the rename":
        replace = os.replace
        os.replace = lambda *names: (replace(*names), die())
    elif moment == "while victims leave":
        unlink = os.unlink
        os.unlink = lambda name: (unlink(name), die())
    elif moment == "before the last commit":
        Catalog.end_write = die
    tier.write(make_chunk(2, key=make_key(1)))
    pipe.send("written")


_MOMENTS = {
    "before the temp file": "old",
    "half written": "old",
    "before the rename": "old",
    "after the rename": "new",
    "before the last commit": "new",
}


@pytest.mark.parametrize("moment", _MOMENTS)
@pytest.mark.parametrize("replaces", [True, False])
def test_kill_at_each_step(root, moment, replaces):
    with DiskTier(root, min_free=0) as tier:
        tier.write(make_chunk(0))
        if replaces:
            tier.write(make_chunk(1))
    assert Child(die_at, root, None, moment).heard() == []
    with DiskTier(root, min_free=0) as tier:
        assert_holds(tier.read(make_key(0)), make_chunk(0))
        if _MOMENTS[moment] == "new":
            assert_holds(tier.read(make_key(1)), make_chunk(2, key=make_key(1)))
        elif replaces:
            assert_holds(tier.read(make_key(1)), make_chunk(1))
        else:
            assert tier.head(make_key(1)) is None
        assert sorted(files(root)) == sorted(tier.path(key) for key in list(tier.keys()))
        assert tier.usage().nbytes == sum(file.stat().st_size for file in files(root))
        assert tier._catalog.writes() == []
        assert len(list((root / "writers").iterdir())) == 1


def test_kill_while_victims_leave(root):
    with DiskTier(root, min_free=0, capacity=3 * SIZE) as tier:
        for seed in (10, 11, 12):
            tier.write(make_chunk(seed))
    assert Child(die_at, root, 3 * SIZE, "while victims leave").heard() == []
    with DiskTier(root, min_free=0, capacity=3 * SIZE) as tier:
        assert tier.read(make_key(10)) is None
        assert tier.head(make_key(10)) is None
        assert held(tier) == {11, 12}
        tier.write(make_chunk(13))
        assert held(tier) == {11, 12, 13}


def share(pipe, root, capacity, seed):
    import random

    from droidspeak.storage.disk import DiskTier
    from droidspeak.storage.testing import assert_holds, make_chunk, make_key

    source = random.Random(seed)
    with DiskTier(root, capacity=capacity, min_free=0, eviction="s3-fifo") as tier:
        for _ in range(150):
            chosen = source.randrange(12)
            if source.random() < 0.5:
                tier.write(make_chunk(chosen, e_layers=range(chosen % 3)))
            elif chunk := tier.read(make_key(chosen)):
                assert_holds(chunk, make_chunk(chosen, e_layers=range(chosen % 3)))
            assert tier.usage().nbytes <= capacity
    pipe.send("sound")


def test_processes_that_share_a_folder_keep_to_one_capacity(root):
    capacity = 5 * SIZE
    children = [Child(share, root, capacity, seed) for seed in range(3)]
    assert [child.heard() for child in children] == [["sound"]] * 3
    with DiskTier(root, capacity=capacity, min_free=0) as tier:
        assert sorted(files(root)) == sorted(tier.path(key) for key in list(tier.keys()))
        assert tier.usage().nbytes == sum(file.stat().st_size for file in files(root)) <= capacity


def test_a_living_writer_is_not_settled(root, tier, monkeypatch):
    write_file = DiskTier.write.__globals__["write_file"]

    def opened_by_another_in_between(path: Path, buffers: list[memoryview]) -> None:
        write_file(path, buffers)
        with DiskTier(root, min_free=0) as other:
            other.rebuild()
            assert len(other._catalog.writes()) == 1
            assert path.exists()

    monkeypatch.setitem(DiskTier.write.__globals__, "write_file", opened_by_another_in_between)
    tier.write(make_chunk(0))
    assert_holds(tier.read(make_key(0)), make_chunk(0))


def test_the_room_of_a_dead_writer_is_taken_back_without_reopening(root):
    with DiskTier(root, capacity=2 * SIZE, min_free=0) as tier:
        tier.write(make_chunk(0))
        tier._catalog.begin_write(PendingWrite("chunks/gone.tmp", make_key(5), SIZE, "1-dead"))
        tier.write(make_chunk(1))
        assert held(tier) == {0, 1}


def test_the_room_of_a_failed_write_is_taken_back_when_the_catalog_failed_too(root, monkeypatch):
    """As on a full disk, where not even the intent can be dropped."""

    def fail(*_: object) -> None:
        raise TierUnavailable("database or disk is full")

    with DiskTier(root, capacity=2 * SIZE, min_free=0) as tier:
        with monkeypatch.context() as patch:
            patch.setattr(Catalog, "end_write", fail)
            with pytest.raises(TierUnavailable):
                tier.write(make_chunk(0))
        assert len(tier._catalog.writes()) == 1
        tier.write(make_chunk(1))
        tier.write(make_chunk(2))
        assert tier._catalog.writes() == []
        assert tier.usage().nbytes == sum(file.stat().st_size for file in files(root)) == 2 * SIZE


# Damage


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_file_cut_anywhere_is_corrupt(tier, codec):
    chunk = make_chunk(0, codec=codec)
    for eighth in range(8):
        tier.write(chunk)
        os.truncate(tier.path(chunk.key), chunk.header.nbytes * eighth // 8)
        with pytest.raises(ChunkCorrupt):
            tier.read(chunk.key)


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_cut_while_it_is_read_is_corrupt(tier, monkeypatch, cached):
    chunk = make_chunk(0)
    tier.write(chunk)
    if cached:
        tier.read(chunk.key)
    preadv = os.preadv

    def cut_first(file: int, buffers: list[memoryview], offset: int) -> int:
        if offset + 5 < tier.path(chunk.key).stat().st_size:
            os.truncate(tier.path(chunk.key), offset + 5)
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", cut_first)
    with pytest.raises(ChunkCorrupt, match="file ends at"):
        tier.read(chunk.key)


def test_every_flipped_byte_is_found(tier):
    chunk = make_chunk(0, layers=1, e_layers=())
    data = chunk.to_bytes()
    for position in range(0, len(data), 23):
        tier.write(chunk)
        with tier.path(chunk.key).open("r+b") as file:
            file.seek(position)
            file.write(bytes([data[position] ^ 1]))
        with pytest.raises(ChunkCorrupt):
            tier.read(chunk.key)


def test_a_file_under_another_name_is_corrupt(tier):
    for seed in (0, 1):
        tier.write(make_chunk(seed))
    a, b = tier.path(make_key(0)), tier.path(make_key(1))
    shutil.copy(a, b)
    with pytest.raises(ChunkCorrupt, match="holds chunk"):
        tier.read(make_key(1))
    assert_holds(tier.read(make_key(0)), make_chunk(0))
    os.replace(a, b)
    assert tier.read(make_key(0)) is None
    with pytest.raises(ChunkCorrupt, match="holds chunk"):
        tier.read(make_key(1))


def test_quarantine_keeps_the_newest(root, tier):
    for seed in range(20):
        tier.write(make_chunk(seed))
        tier.quarantine(make_key(seed))
    kept = [path.read_bytes() for path in sorted((root / "quarantine").iterdir())]
    assert kept == [make_chunk(seed).to_bytes() for seed in range(4, 20)]
    assert files(root) == []
    assert tier.usage() == TierUsage(0, 0)


def test_a_folder_emptied_behind_its_back_is_all_misses_and_still_works(root, tier):
    for seed in range(3):
        tier.write(make_chunk(seed))
    shutil.rmtree(root / "chunks")
    assert [tier.read(make_key(seed)) for seed in range(3)] == [None] * 3
    assert tier.usage() == TierUsage(0, 0)
    tier.write(make_chunk(0))
    assert_holds(tier.read(make_key(0)), make_chunk(0))


# The catalog is made anew from the files


@pytest.mark.parametrize("how", ["missing", "garbage"])
def test_a_lost_catalog_is_made_anew(root, how):
    with DiskTier(root, min_free=0) as tier:
        for seed in range(4):
            tier.write(make_chunk(seed, codec=("raw", "zstd")[seed % 2]))
            os.utime(tier.path(make_key(seed)), (5_000 - seed, 5_000 - seed))
        heads = [tier.head(make_key(seed)) for seed in range(4)]
        usage = tier.usage()
    (root / "catalog.sqlite").unlink()
    if how == "garbage":
        (root / "catalog.sqlite").write_bytes(b"no database at all " * 500)
    with DiskTier(root, min_free=0, capacity=usage.nbytes) as tier:
        assert [tier.head(make_key(seed)) for seed in range(4)] == heads
        assert tier.usage() == TierUsage(usage.chunks, usage.nbytes, usage.nbytes)
        tier.write(make_chunk(4, e_layers=()))
        assert held(tier) == {0, 1, 2, 4}  # 3 is the oldest file
    assert (root / "catalog.broken").exists() == (how == "garbage")


def test_rebuild_finds_what_is_there_and_sorts_out_the_rest(root, tier):
    for seed in range(6):
        tier.write(make_chunk(seed))
    tier.pin(make_key(0))
    os.truncate(tier.path(make_key(1)), 100)
    os.replace(tier.path(make_key(2)), tier.path(make_key(3)))
    tier.path(make_key(4)).unlink()
    new = tier.path(make_key(9))
    new.parent.mkdir(parents=True)
    new.write_bytes(make_chunk(9).to_bytes())
    (new.parent / "notes.txt").write_text("not a chunk")
    (new.parent / f".{make_key(9).prefix}.1-dead.0.tmp").write_bytes(b"left over")
    (root / "chunks" / "stray.safetensors").write_bytes(make_chunk(5).to_bytes())
    usage = tier.rebuild()
    assert held(tier) == {0, 5, 9}
    assert usage == TierUsage(3, 3 * SIZE)
    assert len(list((root / "quarantine").iterdir())) == 4
    assert sorted(files(root)) == sorted(tier.path(key) for key in list(tier.keys()))
    assert [entry.pinned for entry in map(tier._catalog.get, map(make_key, (0, 5, 9)))] == [
        True,
        False,
        False,
    ]


# Room


def test_the_order_of_use_survives_reopening(root):
    with DiskTier(root, capacity=3 * SIZE, min_free=0) as tier:
        for seed in range(3):
            tier.write(make_chunk(seed))
        tier.read(make_key(0))
    with DiskTier(root, capacity=3 * SIZE, min_free=0) as tier:
        tier.write(make_chunk(3))
        assert held(tier) == {0, 2, 3}
        tier.read(make_key(2), [Slot(SlotKind.K, 0)])
        tier.write(make_chunk(4))
        assert held(tier) == {2, 3, 4}


def test_s3_fifo_survives_reopening(root):
    def reopened() -> DiskTier:
        return DiskTier(root, capacity=3 * SIZE, min_free=0, eviction="s3-fifo")

    with reopened() as tier:
        for seed in range(3):
            tier.write(make_chunk(seed))
        for _ in range(2):
            tier.read(make_key(0))
            tier.flush()
    with reopened() as tier:
        tier.write(make_chunk(3))
        assert held(tier) == {0, 2, 3}  # 0 was used twice, 1 only written: it is a ghost now
    with reopened() as tier:
        tier.write(make_chunk(1))
        assert held(tier) == {0, 1, 3}
        tier.write(make_chunk(4))
        assert held(tier) == {0, 1, 4}  # 1 came back as a ghost and skipped the probation


def test_uses_reach_the_catalog_in_batches(tier, monkeypatch):
    for seed in range(4):
        tier.write(make_chunk(seed))
    monkeypatch.setattr("droidspeak.storage.disk._TOUCHES_HELD", 3)
    for seed in (0, 0, 0, 1):
        tier.read(make_key(seed))
    assert tier._catalog.get(make_key(0)).hits == 0
    tier.read(make_key(2))
    assert [tier._catalog.get(make_key(seed)).hits for seed in range(4)] == [1, 1, 1, 0]
    monkeypatch.setattr("droidspeak.storage.disk._TOUCH_SECONDS", 0.0)
    tier.read(make_key(3))
    assert tier._catalog.get(make_key(3)).hits == 1


def test_evicts_to_keep_the_file_system_free(root, monkeypatch):
    disk = namedtuple("disk", "total used free")
    size = 10 * SIZE

    def usage(_: Path) -> disk:
        used = sum(file.stat().st_size for file in files(root))
        return disk(size, used, size - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with DiskTier(root, min_free=7 * SIZE) as tier:
        for seed in range(6):
            tier.write(make_chunk(seed))
            assert usage(root).free >= 7 * SIZE
        assert held(tier) == {3, 4, 5}
        for seed in (3, 4, 5):
            tier.pin(make_key(seed))
        with pytest.raises(TierFull, match=f"{7 * SIZE} bytes are free, {7 * SIZE} stay free"):
            tier.write(make_chunk(6))
        assert held(tier) == {3, 4, 5}
        assert len(files(root)) == 3


def test_a_chunk_larger_than_the_tier_names_both_numbers(root):
    with DiskTier(root, min_free=0, capacity=100) as tier:
        with pytest.raises(TierFull, match=f"{SIZE} bytes, the capacity is 100"):
            tier.write(make_chunk(0))
        assert files(root) == []


def test_room_that_others_are_writing_in_is_waited_for(root, monkeypatch):
    with DiskTier(root, min_free=0, capacity=SIZE) as tier:
        pause = threading.Event()
        write_file = DiskTier.write.__globals__["write_file"]

        def slowly(path: Path, buffers: list[memoryview]) -> None:
            pause.wait(0.1)
            write_file(path, buffers)

        monkeypatch.setitem(DiskTier.write.__globals__, "write_file", slowly)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(tier.write, map(make_chunk, range(4))))
        assert tier.usage().chunks == len(files(root)) == 1
        other = DiskTier(root, min_free=0)
        tier._catalog.begin_write(PendingWrite("elsewhere.tmp", make_key(9), SIZE, other._mark.writer))
        monkeypatch.setattr("droidspeak.storage.disk._CROWD_SECONDS", 0.05)
        with pytest.raises(TierFull, match="being written"):
            tier.write(make_chunk(5))
        other.close()
        tier.write(make_chunk(5))


def test_replacing_needs_no_second_room(root):
    with DiskTier(root, min_free=0, capacity=2 * SIZE) as tier:
        for seed in (0, 1):
            tier.write(make_chunk(seed))
        tier.write(make_chunk(7, key=make_key(1)))
        assert held(tier) == {0, 1}


# A disk that fails


def test_a_file_that_may_not_grow(tier):
    tier.write(make_chunk(0))
    large = make_chunk(1, tokens=65536)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert large.header.nbytes > 1 << 21
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, hard))
    try:
        with pytest.raises(TierUnavailable, match="File too large"):
            tier.write(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _assert_nothing_is_left_over(tier)
    tier.write(large)
    assert_holds(tier.read(large.key), large)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["writev", "replace"])
def test_a_failing_write_leaves_nothing(tier, monkeypatch, call, code):
    tier.write(make_chunk(0))
    real = os.writev

    def fail(*args: object) -> None:
        if call == "writev":
            real(args[0], args[1][:2])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(TierUnavailable, match=os.strerror(code)):
            tier.write(make_chunk(1))
        with pytest.raises(TierUnavailable):
            tier.write(make_chunk(1, key=make_key(0)))
    _assert_nothing_is_left_over(tier)


def _assert_nothing_is_left_over(tier: DiskTier) -> None:
    assert held(tier) == {0}
    assert files(tier.root) == [tier.path(make_key(0))]
    assert_holds(tier.read(make_key(0)), make_chunk(0))
    assert tier._catalog.writes() == []


def test_an_interrupted_write_leaves_nothing(tier, monkeypatch):
    tier.write(make_chunk(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            tier.write(make_chunk(1))
    _assert_nothing_is_left_over(tier)


def test_a_failing_read_is_unavailable_not_a_miss(tier, monkeypatch):
    tier.write(make_chunk(0))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(TierUnavailable, match=r"safetensors: Input/output error"):
        tier.read(make_key(0))
    assert tier.head(make_key(0))


def test_writes_and_reads_that_the_system_cuts_short(tier, monkeypatch):
    writev, preadv = os.writev, os.preadv
    monkeypatch.setattr(os, "writev", lambda file, buffers: writev(file, [buffers[0][:100]]))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:100]], at))
    tier.write(make_chunk(0))
    assert_holds(tier.read(make_key(0)), make_chunk(0))


def test_more_buffers_than_one_call_takes(tier):
    chunk = make_chunk(0, layers=700)
    assert len(chunk.buffers()) > os.sysconf("SC_IOV_MAX")
    tier.write(chunk)
    assert_holds(tier.read(chunk.key), chunk)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "store").write_text("a file")
    for root in (tmp_path / "store", tmp_path / "store" / "below"):
        with pytest.raises(TierUnavailable, match=f"^{root}: [^\n]+$"):
            DiskTier(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TierUnavailable, match="Permission denied"):
        DiskTier(tmp_path / "store")


# Eviction on request


def test_evicts_by_last_use_and_takes_the_files(tier):
    for seed in range(4):
        tier.write(make_chunk(seed))
    tier.read(make_key(0))  # a use that has not reached the catalog
    assert tier.evict(SIZE + 1) == 2 * SIZE
    assert held(tier) == {0, 3}
    assert set(files(tier.root)) == {tier.path(make_key(0)), tier.path(make_key(3))}


def test_an_eviction_that_fails_loses_nothing_but_files(tier, monkeypatch):
    for seed in range(3):
        tier.write(make_chunk(seed))
    second, unlink = tier.path(make_key(1)), Path.unlink

    def no_second(path, **options):
        if path == second:
            raise OSError(errno.EROFS, "Read-only file system")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", no_second)
    with pytest.raises(TierUnavailable, match="Read-only"):
        tier.evict(2 * SIZE)
    monkeypatch.undo()
    assert tier.read(make_key(0)) is None
    assert held(tier) == {1, 2}
    for seed in (1, 2):
        assert_holds(tier.read(make_key(seed)), make_chunk(seed))


def test_a_closed_tier_evicts_nothing(tier):
    tier.close()
    with pytest.raises(TierUnavailable, match="closed"):
        tier.evict(1)


# Read-only


def test_read_only_reads_and_changes_nothing(root):
    with DiskTier(root, min_free=0) as tier:
        for seed in range(3):
            tier.write(make_chunk(seed))
        tier.path(make_key(1)).unlink()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with DiskTier(root, read_only=True) as tier:
        assert_holds(tier.read(make_key(0)), make_chunk(0))
        assert tier.read(make_key(1)) is None
        assert tier.usage().chunks == 3
        assert tier.pin(make_key(0))
        assert not tier.pin(make_key(9))
        assert tier.evict(1) == 0
        for change in (
            lambda: tier.write(make_chunk(5)),
            lambda: tier.delete(make_key(0)),
            lambda: tier.quarantine(make_key(0)),
            tier.rebuild,
        ):
            with pytest.raises(TierUnavailable, match="opened read-only"):
                change()
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_read_only_needs_a_store(tmp_path):
    with pytest.raises(TierUnavailable, match=f"{tmp_path}/none"):
        DiskTier(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


def test_a_closed_tier_says_so(root):
    tier = DiskTier(root, min_free=0)
    tier.close()
    with pytest.raises(TierUnavailable, match="closed"):
        tier.write(make_chunk(0))
    assert list((root / "writers").iterdir()) == []


# Files and bytes


def test_the_safetensors_library_opens_the_file(tier):
    chunk = make_chunk(0, layers=3, e_layers=(0, 2))
    tier.write(chunk)
    with safe_open(tier.path(chunk.key), framework="pt") as file:
        assert file.metadata()["key"] == str(chunk.key)
        assert set(file.keys()) == {slot.name for slot in chunk.payload}
        for slot in chunk.payload:
            read = file.get_tensor(slot.name)
            assert torch.equal(read.view(torch.uint8), chunk.tensor(slot).view(torch.uint8))


def test_a_layer_costs_its_header_once_and_its_bytes(tier, monkeypatch):
    chunk = make_chunk(0, layers=8, e_layers=(2,))
    tier.write(chunk)
    requests: list[tuple[int, int]] = []
    pread, preadv = os.pread, os.preadv

    def counted_pread(file: int, size: int, offset: int) -> bytes:
        requests.append((offset, size))
        return pread(file, size, offset)

    def counted_preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        requests.append((offset, sum(map(len, buffers))))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "pread", counted_pread)
    monkeypatch.setattr(os, "preadv", counted_preadv)

    def cost(slots: list[Slot]) -> list[tuple[int, int]]:
        requests.clear()
        assert_holds(tier.read(chunk.key, slots), chunk, slots)
        return list(requests)

    start, records = chunk.header.data_start, chunk.header.records

    def span(first: Slot, last: Slot) -> tuple[int, int]:
        return (start + records[first].start, records[last].end - records[first].start)

    k3, v3, e2 = Slot(SlotKind.K, 3), Slot(SlotKind.V, 3), Slot(SlotKind.E, 2)
    assert cost([k3, v3]) == [(0, start), span(k3, v3)]
    assert cost([k3, v3]) == [span(k3, v3)]
    assert cost([e2]) == [span(e2, e2)]
    assert cost([e2, *Slot.kv([3, 4])]) == [span(e2, e2), span(k3, Slot(SlotKind.V, 4))]
    assert cost([]) == []
    monkeypatch.setattr(DiskTier, "best_read", records[k3].nbytes)
    assert cost([k3, v3]) == [span(k3, k3), span(v3, v3)]


def test_long_reads_share_their_ranges_with_a_helper(tier, monkeypatch):
    """Every range is read once, by one of two threads, and damage is found whoever reads it."""
    monkeypatch.setattr(DiskTier, "best_read", 1)
    chunk = make_chunk(0, layers=30)
    tier.write(chunk)
    readers: list[tuple[int, int]] = []
    preadv = os.preadv

    def slow_preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        readers.append((threading.get_ident(), offset))
        time.sleep(0.001)
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow_preadv)
    assert_holds(tier.read(chunk.key), chunk)
    starts = [chunk.header.data_start + record.start for record in chunk.header.records.values()]
    assert sorted(offset for _, offset in readers) == starts
    assert len({thread for thread, _ in readers}) == 2
    for start in starts[::9]:
        tier.write(chunk)
        with tier.path(chunk.key).open("r+b") as file:
            file.seek(start)
            file.write(bytes([chunk.to_bytes()[start] ^ 1]))
        with pytest.raises(ChunkCorrupt, match="differs from its checksum"):
            tier.read(chunk.key)


def test_many_long_reads_at_once_with_one_helper(tier, monkeypatch):
    monkeypatch.setattr(DiskTier, "best_read", 1)
    chunks = [make_chunk(seed, layers=20) for seed in range(6)]
    for chunk in chunks:
        tier.write(chunk)
    with ThreadPoolExecutor(8) as pool:
        for chunk, got in zip(chunks * 20, pool.map(tier.read, [c.key for c in chunks * 20]), strict=True):
            assert_holds(got, chunk)
    tier._reader._helper.shutdown()
    assert_holds(tier.read(chunks[0].key), chunks[0])


def test_reads_straight_into_the_callers_memory(tier):
    chunk = make_chunk(0)
    tier.write(chunk)
    into = {slot: torch.empty_like(chunk.tensor(slot)) for slot in chunk.payload}
    got = tier.read(chunk.key, into=into)
    assert isinstance(got, Chunk)
    for slot, tensor in into.items():
        assert got.payload[slot].data_ptr() == tensor.data_ptr()


def test_sources(tier):
    for seed in range(3):
        tier.write(make_chunk(seed, key=make_key(seed, source=seed % 2)))
    assert tier.sources() == {
        make_key(0).source: TierUsage(2, 2 * SIZE),
        make_key(0, source=1).source: TierUsage(1, SIZE),
    }

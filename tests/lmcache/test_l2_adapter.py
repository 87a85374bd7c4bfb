"""The L2 adapter behind LMCache's interface: real keys, memory objects, descriptors and tiers."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from itertools import count

import pytest
import torch

from droidspeak.config.opening import open_store_from, release_store
from droidspeak.errors import ConfigError
from droidspeak.storage.objects import object_slot

from .l2_objects import (
    BF16,
    SECONDS,
    DroidSpeakL2Adapter,
    DroidSpeakL2AdapterConfig,
    Layout,
    ObjectKey,
    chunk_files,
    chunk_key,
    content,
    eventually,
    key,
    loaded,
    memory_object,
    opened,
)

LAYOUTS = {
    "bf16": BF16,
    "uint8": [(torch.uint8, (4096,))],
    "int8": [(torch.int8, (2, 4, 16, 32))],
    "two groups": [(torch.bfloat16, (2, 3, 16, 32)), (torch.float8_e4m3fn, (2, 1, 16, 64))],
    "two groups, one of bytes": [(torch.float32, (5, 3)), (torch.int8, (7,))],
}


@pytest.fixture
def disk(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def driver(disk):
    with opened(f"disk://{disk}") as driver:
        yield driver


def keys_and_objects(number, first=0, parts=BF16):
    return [key(first + n) for n in range(number)], [memory_object(parts) for _ in range(number)]


def blanks(number, parts=BF16, fill=0):
    return [memory_object(parts, fill) for _ in range(number)]


# Round trips


@pytest.mark.parametrize("parts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tiers", ["disk", "cpu", "cpu disk"])
@pytest.mark.parametrize("params", [{}, {"direct": False}, {"codec": "zstd"}], ids=["direct", "own", "zstd"])
def test_what_is_loaded_is_what_was_stored(tmp_path, parts, tiers, params):
    urls = [f"disk://{tmp_path}" if tier == "disk" else "cpu://?capacity=16MiB" for tier in tiers.split()]
    keys, objects = keys_and_objects(3, parts=parts)
    targets = blanks(3, parts)
    with opened(*urls, **params) as driver:
        assert driver.lookup(keys) == [False] * 3
        assert driver.store(keys, objects)
        assert driver.lookup(keys) == [True] * 3
        assert driver.load(keys, targets) == [True] * 3
        assert [content(target) for target in targets] == [content(obj) for obj in objects]


def test_bits_are_of_single_objects(driver):
    keys, objects = keys_and_objects(4)
    assert driver.store(keys[1::2], objects[1::2])
    assert driver.lookup(keys) == [False, True, False, True]
    assert driver.load(keys, blanks(4)) == [False, True, False, True]
    assert driver.failures("load_failed") == {"missing": 2}


def test_empty_tasks_end(driver):
    assert driver.store([], [])
    assert driver.lookup([]) == driver.load([], []) == []


def test_a_store_tells_its_bytes_and_what_is_there_is_not_written_again(driver):
    keys, objects = keys_and_objects(2)
    submit = driver.adapter.submit_store_task
    assert driver.end_store(submit(keys, objects)).bytes_transferred() == 2 * len(content(objects[0]))
    assert driver.end_store(submit(keys, objects)).bytes_transferred() == 0
    assert driver.adapter.counters.snapshot() == {"stored": {"": 2}, "present": {"": 2}}


def test_descriptors_and_task_ids_are_distinct(driver):
    adapter = driver.adapter
    descriptors = {
        adapter.get_store_event_fd(),
        adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    }
    assert len(descriptors) == 3
    keys, objects = keys_and_objects(2)
    ids = [adapter.submit_store_task(keys, objects) for _ in range(5)]
    ids += [adapter.submit_lookup_and_lock_task(keys, {}) for _ in range(5)]
    ids += [adapter.submit_load_task(keys, blanks(2)) for _ in range(5)]
    assert len(set(ids)) == 15


def test_tasks_of_many_threads_do_not_mix(driver):
    failures = []

    def use(thread):
        keys, objects = keys_and_objects(4, first=1000 * thread)
        targets = blanks(4)
        stores.append((adapter.submit_store_task(keys, objects), keys, objects, targets))

    adapter, stores = driver.adapter, []
    threads = [threading.Thread(target=use, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(driver.end_store(task).is_successful() for task, *_ in stores)
    loads = [
        (adapter.submit_load_task(keys, targets), objects, targets) for _, keys, objects, targets in stores
    ]
    for task, objects, targets in reversed(loads):
        assert driver.end_load(task, 4) == [True] * 4
        failures += [a for a, b in zip(objects, targets, strict=True) if content(a) != content(b)]
    assert not failures


@pytest.mark.parametrize("params", [{}, {"acknowledge": "memory"}], ids=["durable", "memory"])
@pytest.mark.parametrize("tiers", ["disk", "cpu disk", "disk disk"])
def test_memory_is_free_again_when_a_store_is_reported(tmp_path, tiers, params):
    urls = [
        "cpu://?capacity=64MiB" if tier == "cpu" else f"disk://{tmp_path / str(n)}?name=d{n}"
        for n, tier in enumerate(tiers.split())
    ]
    keys, objects = keys_and_objects(8, parts=[(torch.uint8, (1 << 20,))])
    before = [content(obj) for obj in objects]
    targets = blanks(8, [(torch.uint8, (1 << 20,))])
    with opened(*urls, **params) as driver:
        assert driver.store(keys, objects)
        for obj in objects:
            obj.raw_data.zero_()
        assert driver.load(keys, targets) == [True] * 8
    assert [content(target) for target in targets] == before
    for n, tier in enumerate(tiers.split()):
        if tier == "disk":
            with opened(urls[n]) as driver:
                assert driver.load(keys, targets) == [True] * 8


# What is wrong is a 0 bit


def flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(flip, "corrupt"), (cut, "corrupt"), (lambda path: path.unlink(), "missing")],
    ids=["flipped byte", "truncated", "deleted"],
)
def test_damage_between_lookup_and_load_is_a_zero_bit(driver, disk, damage, reason):
    keys, objects = keys_and_objects(3)
    assert driver.store(keys, objects)
    assert driver.lookup(keys) == [True] * 3
    name = chunk_key(keys[1]).prefix
    damage(next(path for path in chunk_files(disk) if path.stem == name))
    targets = blanks(3)
    assert driver.load(keys, targets) == [True, False, True]
    assert [content(targets[n]) == content(objects[n]) for n in range(3)] == [True, False, True]
    assert driver.failures("load_failed") == {reason: 1}
    driver.unlock(keys)
    assert driver.lookup(keys) == [True, False, True]
    assert driver.store([keys[1]], [objects[1]])
    assert driver.load(keys, targets) == [True] * 3


@pytest.mark.parametrize(
    "asked",
    [
        [(torch.bfloat16, (2, 4, 16, 16))],
        [(torch.bfloat16, (2, 4, 32, 16))],
        [(torch.float16, (2, 4, 16, 32))],
        [(torch.int8, (2, 4, 16, 64))],
        [(torch.bfloat16, (1, 4, 16, 32)), (torch.bfloat16, (1, 4, 16, 32))],
    ],
    ids=["shorter", "other shape", "other dtype", "bytes", "two groups"],
)
@pytest.mark.parametrize("tier", ["disk", "cpu"])
@pytest.mark.parametrize("swapped", [False, True])
def test_another_layout_is_refused_before_anything_is_written(tmp_path, asked, tier, swapped):
    stored, asked = (asked, BF16) if swapped else (BF16, asked)
    target = memory_object(asked, fill=7)
    with opened(f"disk://{tmp_path}" if tier == "disk" else "cpu://?capacity=16MiB") as driver:
        assert driver.store([key(1)], [memory_object(stored)])
        assert driver.load([key(1)], [target]) == [False]
        assert driver.failures("load_failed") == {"layout": 1}
        assert set(content(target)) == {7}
        replacement = memory_object(asked)
        assert driver.store([key(1)], [replacement])
        assert driver.load([key(1)], [target]) == [True]
        assert content(target) == content(replacement)


def test_more_groups_than_stored_and_fewer_are_refused(driver):
    two = [(torch.bfloat16, (8,)), (torch.bfloat16, (8,))]
    pairs = [(two, [*two, two[0]]), ([*two, two[0]], two), (two, two[:1]), (two[:1], two)]
    for index, (stored, asked) in enumerate(pairs):
        target = memory_object(asked, fill=7)
        assert driver.store([key(index)], [memory_object(stored)])
        assert driver.load([key(index)], [target]) == [False]
        assert set(content(target)) == {7}


def test_memory_that_changed_in_the_store_is_noticed_and_given_up():
    tiers = ["cpu://?capacity=16MiB"]
    with opened(*tiers) as driver:
        assert driver.store([key(1)], [memory_object()])
        store = open_store_from({"tiers": tiers})
        store.read(chunk_key(key(1))).payload[object_slot()][100] ^= 1
        assert driver.load([key(1)], blanks(1)) == [False]
        assert driver.failures("load_failed") == {"corrupt": 1}
        assert driver.lookup([key(1)]) == [False]
        release_store(store)


def test_what_cannot_be_stored_fails_the_task_with_a_reason(tmp_path):
    with opened(f"disk://{tmp_path}?capacity=64KiB") as driver:
        keys, objects = keys_and_objects(1, parts=[(torch.uint8, (100_000,))])
        small = memory_object()
        assert not driver.store([*keys, key(7)], [*objects, small])
        assert driver.failures("store_failed") == {"not_durable": 1}
        assert driver.lookup([*keys, key(7)]) == [False, True]


def test_a_folder_that_cannot_be_used_is_a_miss(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with opened(f"disk://{blocked}/store", persist_timeout=2) as driver:
        keys, objects = keys_and_objects(2)
        assert driver.lookup(keys) == [False, False]
        assert driver.load(keys, blanks(2)) == [False, False]
        assert not driver.store(keys, objects)
        assert set(driver.failures("load_failed")) == {"unavailable"}
        assert driver.adapter.report_status()["is_healthy"] is False


# A tier that hangs. Opening a FIFO blocks until somebody writes: a read that really does not come back.


@pytest.fixture
def hanging(disk):
    """A driver, the key of an object whose file hangs, a sound key, and what lets the read go."""
    limits = {"disk": {"read_deadline": 0.3, "cooldown": 0.05, "max_cooldown": 0.1}}
    with opened(f"disk://{disk}", limits=limits) as driver:
        keys, objects = keys_and_objects(2)
        assert driver.store(keys, objects)
        path = next(path for path in chunk_files(disk) if path.stem == chunk_key(keys[0]).prefix)
        path.unlink()
        os.mkfifo(path)
        yield driver, keys, lambda: os.close(os.open(path, os.O_WRONLY))


def test_a_late_read_is_reported_when_it_has_let_go_of_the_memory(hanging):
    driver, keys, let_go = hanging
    task = driver.adapter.submit_load_task(keys[:1], blanks(1))
    assert eventually(lambda: bool(driver.failures("load_failed")))
    assert driver.failures("load_failed") == {"timeout": 1}
    assert driver.adapter.query_load_result(task) is None
    # Others go on meanwhile.
    assert eventually(lambda: driver.load(keys[1:], blanks(1)) == [True])
    assert driver.adapter.query_load_result(task) is None
    let_go()
    assert driver.end_load(task, 1) == [False]


def test_without_direct_reads_nobody_waits_for_a_late_one(disk):
    limits = {"disk": {"read_deadline": 0.3}}
    with opened(f"disk://{disk}", limits=limits, direct=False) as driver:
        assert driver.store([key(0)], [memory_object()])
        (path,) = chunk_files(disk)
        path.unlink()
        os.mkfifo(path)
        assert driver.load([key(0)], blanks(1)) == [False]
        assert driver.failures("load_failed") == {"timeout": 1}
        os.close(os.open(path, os.O_WRONLY))


# Locks


def small_disk(path, objects):
    """A disk tier with room for `objects` objects."""
    return f"disk://{path}?capacity={objects * 10_000}&min_free=0"


def test_locked_objects_are_not_evicted(disk):
    keys, objects = keys_and_objects(4)
    with opened(small_disk(disk, 2)) as driver:
        assert driver.store(keys[:2], objects[:2])
        assert driver.lookup(keys[:2]) == [True, True]
        assert driver.lookup(keys[:1]) == [True]
        assert not driver.store(keys[2:3], objects[2:3])
        driver.unlock(keys[:2], left=1)
        # The first has a lock left, so the second goes.
        assert driver.store(keys[2:3], objects[2:3])
        assert driver.lookup(keys[:3]) == [True, False, True]
        assert driver.adapter.report_status()["locks"] == 2
        driver.unlock([keys[0], keys[0], keys[2], keys[3]])
        for key, obj in zip([keys[1], keys[3]], [objects[1], objects[3]], strict=True):
            assert driver.store([key], [obj])
        assert driver.lookup(keys) == [False, True, False, True]


def test_closing_unlocks(disk):
    keys, objects = keys_and_objects(4)
    with opened(small_disk(disk, 2)) as driver:
        assert driver.store(keys[:2], objects[:2])
        assert driver.lookup(keys[:2]) == [True, True]
    with opened(small_disk(disk, 2)) as driver:
        assert driver.store(keys[2:], objects[2:])
        assert driver.lookup(keys) == [False, False, True, True]


# Tenants


def test_salts_are_apart_and_nowhere_to_be_read(driver, disk):
    one, two = key(1, salt="tenant-one"), key(1, salt="tenant-two")
    obj, other = memory_object(), memory_object()
    assert driver.store([one], [obj])
    assert driver.lookup([one, two, key(1)]) == [True, False, False]
    assert driver.store([two], [other])
    targets = blanks(2)
    assert driver.load([one, two], targets) == [True, True]
    assert [content(target) for target in targets] == [content(obj), content(other)]
    driver.adapter.report_status()
    for path in disk.rglob("*"):
        assert "tenant" not in str(path.relative_to(disk))
        assert path.is_dir() or b"tenant" not in path.read_bytes()


def test_every_field_of_a_key_counts():
    keys = [
        ObjectKey(digest, model, rank, group, salt)
        for digest in (b"", b"\0", b"1", b"11")
        for model in ("", "m", "m1", "\N{LATIN SMALL LETTER E WITH ACUTE}", "e\N{COMBINING ACUTE ACCENT}")
        for rank in (0, 1, 11, 0x01000100, 0x02010201)
        for group in (0, 1, 11)
        for salt in ("", "1", "11")
    ]
    assert len({chunk_key(one) for one in keys}) == len(keys)


# Accounts


def test_usage_by_salt_follows_stores_and_deletes(driver):
    size = len(content(memory_object()))
    keys = [key(1), key(2, salt="a"), key(3, salt="a")]
    assert driver.store(keys, blanks(3))
    assert driver.store(keys, blanks(3))
    usage = driver.adapter.get_usage()
    assert usage.total_bytes_used == 3 * size
    assert dict(usage.bytes_by_cache_salt) == {"": size, "a": 2 * size}
    driver.adapter.delete([keys[1], key(9)])
    assert dict(driver.adapter.get_usage().bytes_by_cache_salt) == {"": size, "a": size}
    assert driver.lookup(keys) == [True, False, True]


def test_a_locked_object_is_not_deleted(driver):
    assert driver.store([key(1)], blanks(1))
    assert driver.lookup([key(1)]) == [True]
    driver.adapter.delete([key(1)])
    assert driver.load([key(1)], blanks(1)) == [True]
    driver.unlock([key(1)])
    driver.adapter.delete([key(1)])
    assert driver.lookup([key(1)]) == [False]


def test_what_the_store_has_evicted_is_taken_off(disk):
    with opened(small_disk(disk, 2)) as driver:
        for n in range(4):
            assert driver.store([key(n)], [memory_object()])
        size = len(content(memory_object()))
        assert driver.adapter.get_usage().total_bytes_used == 4 * size
        driver.adapter.reconcile()
        assert driver.adapter.get_usage().total_bytes_used == 2 * size
        assert driver.adapter.get_usage().total_capacity_bytes == 20_000


def test_listeners_hear_of_stores_loads_and_deletes(driver):
    heard = []

    class Listener:
        def on_l2_keys_stored(self, keys, sizes):
            heard.append(("stored", keys, sizes))

        def on_l2_keys_accessed(self, keys):
            heard.append(("accessed", keys))

        def on_l2_keys_deleted(self, keys):
            heard.append(("deleted", keys))

    driver.adapter.register_listener(Listener())
    assert driver.store([key(1)], [memory_object()])
    assert driver.load([key(1), key(2)], blanks(2)) == [True, False]
    driver.adapter.delete([key(1)])
    size = len(content(memory_object()))
    assert heard == [("stored", [key(1)], [size]), ("accessed", [key(1)]), ("deleted", [key(1)])]


def listed(adapter, **how):
    pages, cursor = [], None
    for _ in count():
        page = adapter.list_l2_keys(cursor=cursor, **how)
        pages.append(page)
        cursor = page.next_page_token
        if cursor is None:
            return [
                (entry.key.to_object_key(), entry.size_bytes) for page in pages for entry in page.entries
            ], pages
    raise AssertionError


def test_listing_in_pages_and_after_a_restart(disk):
    plain = [key(n) for n in range(5)] + [key(7, model="other", rank=0x04020402, group=3)]
    size = len(content(memory_object()))
    with opened(f"disk://{disk}") as driver:
        assert driver.store([*plain, key(8, salt="s")], blanks(7))
        found, pages = listed(driver.adapter, page_size=3)
        assert sorted(found, key=str) == sorted([(one, size) for one in [*plain, key(8, salt="s")]], key=str)
        assert [len(page.entries) for page in pages] == [3, 3, 1]
        assert listed(driver.adapter, model_name="other")[0] == [(plain[5], size)]
    with opened(f"disk://{disk}") as driver:
        assert {one for one, _ in listed(driver.adapter)[0]} == set(plain)
        assert driver.lookup([key(8, salt="s")]) == [True]
        assert {one for one, _ in listed(driver.adapter)[0]} == {*plain, key(8, salt="s")}
        assert driver.adapter.get_usage().bytes_by_cache_salt.keys() == {"s"}


@pytest.mark.parametrize("how", [{"page_size": 0}, {"cursor": "nonsense"}])
def test_listing_refuses_nonsense(driver, how):
    with pytest.raises(ValueError, match=r"page_size|chunk key"):
        driver.adapter.list_l2_keys(**how)


def test_status_is_json_and_healthy(driver):
    assert driver.store([key(1)], [memory_object()])
    status = json.loads(json.dumps(driver.adapter.report_status()))
    assert status["is_healthy"] is True
    assert status["type"] == "DroidSpeakL2Adapter"
    assert status["tiers"] == {"disk": {"reading": "closed", "writing": "closed"}}
    assert status["counters"] == {"stored": {"": 1}}
    driver.adapter.close()
    assert driver.adapter.report_status()["is_healthy"] is False


# The end


def descriptors():
    """What is open, by number and name: that an earlier test's read ends meanwhile hides nothing new."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def own_threads():
    return {thread for thread in threading.enumerate() if "droidspeak" in thread.name}


def test_closing_leaves_no_descriptor_and_no_thread(tmp_path):
    with opened(f"disk://{tmp_path / 'warm'}") as driver:
        assert driver.store([key(1)], [memory_object()])
    before, threads = descriptors(), own_threads()
    for n in range(3):
        with opened(f"disk://{tmp_path / str(n)}") as driver:
            keys, objects = keys_and_objects(4)
            assert driver.store(keys, objects)
            assert driver.lookup(keys) == driver.load(keys, blanks(4)) == [True] * 4
    left = own_threads() - threads
    for thread in left:
        thread.join(SECONDS)
    assert not [thread.name for thread in left if thread.is_alive()]
    assert descriptors() - before == set()


def test_closing_with_work_under_way(disk):
    parts = [(torch.uint8, (1 << 20,))]
    keys, objects = keys_and_objects(24, parts=parts)
    before = descriptors()
    with opened(f"disk://{disk}", workers=1) as driver:
        assert driver.store(keys[:4], objects[:4])
        tasks = []
        for n in range(4, 24, 4):
            tasks.append(driver.adapter.submit_store_task(keys[n : n + 4], objects[n : n + 4]))
            driver.adapter.submit_lookup_and_lock_task(keys[:4], {})
            driver.adapter.submit_load_task(keys[:4], blanks(4, parts))
            driver.adapter.submit_unlock(keys[:2])
        driver.adapter.close()
        driver.adapter.close()
        results = driver.adapter.pop_completed_store_tasks()
        assert set(results) == set(tasks)
        status = driver.adapter.report_status()
        assert set(status["in_flight"].values()) == {0}
        assert status["locks"] == 0
    assert descriptors() - before == set()
    with opened(f"disk://{disk}") as driver:
        # The task under way ends after those that never began, so results come in any order.
        done = [results[task].is_successful() for task in tasks]
        held = [driver.lookup(keys[n : n + 4]) == [True] * 4 for n in range(4, 24, 4)]
        assert all(there for success, there in zip(done, held, strict=True) if success)


# Parameters


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"tier": []}, "unknown adapter_params key 'tier'; allowed: tiers, config, codec"),
        ({"chunk_size": 256}, "unknown adapter_params key 'chunk_size'; allowed: tiers"),
        ({"tiers": ["disk:///tmp?size=1"]}, "unknown option size; allowed: path"),
        ({"tiers": ["nfs://x"]}, "unknown tier 'nfs'"),
        ({"tiers": []}, "tiers"),
        ({"workers": 0}, "'workers': allowed is 1 to 64, not 0"),
        ({"workers": True}, "'workers': allowed is 1 to 64, not True"),
        ({"acknowledge": "maybe"}, "'acknowledge': allowed is durable or memory, not 'maybe'"),
        ({"persist_timeout": -1}, "'persist_timeout': allowed is 0 to 86400 seconds, not -1"),
        ({"persist_timeout": "1"}, "'persist_timeout'"),
        ({"direct": 1}, "'direct': allowed is true or false, not 1"),
        ({"codec": "gzip"}, "codec"),
        ({"config": 3}, "config"),
        ({"config": "/nowhere.yaml"}, "No such file"),
    ],
)
def test_wrong_parameters_are_told_in_one_line(params, told):
    with pytest.raises(ConfigError) as error:
        DroidSpeakL2Adapter(DroidSpeakL2AdapterConfig.from_dict(params))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_lmcache_loads_it_and_tells_a_wrong_parameter(disk):
    spec = {
        "type": "plugin",
        "module_path": "droidspeak.integrations.lmcache_plugin.l2",
        "class_name": "DroidSpeakL2Adapter",
        "config_class_name": "DroidSpeakL2AdapterConfig",
    }
    adapter = loaded({**spec, "adapter_params": {"tiers": [f"disk://{disk}"]}})
    assert isinstance(adapter, DroidSpeakL2Adapter)
    adapter.close()
    with pytest.raises(ConfigError, match="unknown adapter_params key 'tier'; allowed: tiers, config"):
        loaded({**spec, "adapter_params": {"tier": [f"disk://{disk}"]}})


def test_help_names_every_parameter():
    text = DroidSpeakL2AdapterConfig.help()
    for name in ("tiers", "config", "codec", "promote", "write_queue", "limits", "workers", "acknowledge"):
        assert name in text
    for name in ("persist_timeout", "direct"):
        assert name in text


def test_the_layout_of_narrowed_memory_is_its_bytes():
    obj = memory_object()
    obj.set_used_size(100)
    assert Layout.of(obj).parts == ((torch.uint8, (100,)),)

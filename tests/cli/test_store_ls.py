"""`droidspeak store ls`, `top`, `df` and `show`, on every kind of store."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from droidspeak.layerselect import Plan, Policy
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.storage import Architecture, SourceManifest, TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.keys import ChunkKey, salt_tag
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.testing import make_chunk, make_key
from tests.cli.commandline import call
from tests.storage.daemons import closed_port, serving

TENANT = "a tenant's secret"
ARCHITECTURE = Architecture("llama", 4, 2, 4, 8, 100, "{}", "{}", "bfloat16")
SENDER = SourceManifest("1" * 64, ARCHITECTURE, "ids:100")
RECEIVER = SourceManifest("2" * 64, ARCHITECTURE, "ids:100")
CHUNKS = [
    make_chunk(
        seed,
        key=ChunkKey(SENDER.source_id, "0of1", make_key(seed).prefix) if seed < 4 else make_key(seed),
        layers=4,
        e_layers=(2,) if seed % 2 else (),
        codec="zstd" if seed == 5 else "raw",
        salt=TENANT if seed == 3 else "",
    )
    for seed in range(6)
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with DiskTier(tmp_path / "store", min_free=0) as tier:
        for chunk in CHUNKS:
            tier.write(chunk)
        tier.read(CHUNKS[4].key)
        tier.flush()
        tier.pin(CHUNKS[1].key)
    return tmp_path / "store"


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configured folder of policies that calls the sender `base`."""
    folder = tmp_path / "policies"
    folder.mkdir()
    policy = Policy.fixed(SENDER.source_id, RECEIVER.source_id, Plan.parse("2-3", 4))
    write_policy(folder / "pair.json", policy, Side.of("base", SENDER), Side.of("tuned", RECEIVER))
    monkeypatch.setenv("DROIDSPEAK_POLICIES", str(folder))
    return folder


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def listed(root: Path, *words: str) -> list[int]:
    """Which of `CHUNKS` are listed, in order."""
    found = rows(call("store", "ls", "--store", f"disk://{root}", "--format", "jsonl", *words))
    seeds = {str(chunk.key): seed for seed, chunk in enumerate(CHUNKS)}
    return [seeds[row["key"]] for row in found]


# ls


@pytest.mark.parametrize(
    ("filters", "seeds"),
    [
        ([], {0, 1, 2, 3, 4, 5}),
        (["e=2"], {1, 3, 5}),
        (["e!=2"], {0, 2, 4}),
        (["--filter", "pinned=true"], {1}),
        (["pinned=no", "codec=raw"], {0, 2, 3, 4}),
        ([f"salt={salt_tag(TENANT)}"], {3}),
        (["salt="], {0, 1, 2, 4, 5}),
        (["hits>=1"], {4}),
        (["tokens=16", "tokens<17", "tokens>15", "tokens!=3"], {0, 1, 2, 3, 4, 5}),
        (["size>1KB", "size<=1GiB"], {0, 1, 2, 3, 4, 5}),
        (["accessed<1h"], {0, 1, 2, 3, 4, 5}),
        (["accessed>7d"], set()),
        (["created<2020-01-01"], set()),
        (["created>2020-01-01T00:00+02:00"], {0, 1, 2, 3, 4, 5}),
        ([f"model={SENDER.source_id[:8]}"], {0, 1, 2, 3}),
        ([f"model!={SENDER.source_id}"], {4, 5}),
        (["--filter", "tier=disk", "e=2", "--filter", "shard=0of1"], {1, 3, 5}),
        (["tier!=disk"], set()),
    ],
)
def test_filters(root, filters, seeds):
    assert set(listed(root, *filters)) == seeds


def test_a_model_by_the_name_that_a_policy_gives_it(root, policies):
    assert set(listed(root, "model=base")) == {0, 1, 2, 3}
    assert set(listed(root, "model=tuned")) == set()
    done = call("store", "ls", "--store", f"disk://{root}", "model=basic")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a name that a policy of the configured folder gives (base, tuned)" in done.stderr
    assert "base  " in call("store", "ls", "--store", f"disk://{root}", "model=base").stdout


def test_a_salt_stands_in_a_file_and_is_never_shown(root, tmp_path):
    (tmp_path / "salt").write_text(f"{TENANT}\n")
    assert listed(root, f"salt=@{tmp_path}/salt") == [3]
    done = call("store", "ls", "--store", f"disk://{root}", f"salt={TENANT}")
    assert done.returncode == 2
    assert "16 hex digits" in done.stderr
    assert TENANT not in done.stderr
    assert TENANT not in "".join(path.read_bytes().decode("latin-1") for path in root.rglob("*.s*"))


def test_order_and_limit(root):
    sizes = {seed: chunk.header.nbytes for seed, chunk in enumerate(CHUNKS)}
    largest = listed(root, "--sort", "size:desc")
    assert [sizes[seed] for seed in largest] == sorted(sizes.values(), reverse=True)
    assert listed(root, "--sort", "size:desc", "--limit", "2") == largest[:2]
    assert listed(root, "--sort", "created") == [0, 1, 2, 3, 4, 5]
    assert len(listed(root, "--limit", "4")) == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sise>1"], "not a filter: 'sise'; allowed are model, tier, size"),
        (["size"], "not a filter"),
        (["size>1QB"], "size: not a size: '1QB'"),
        (["size>99999999999999999999"], "is no value of it"),
        (["tokens=-1"], "tokens: '-1'; allowed are whole numbers"),
        (["codec=gzip"], "allowed: raw, zstd"),
        (["codec<raw"], "codec<: allowed are = !="),
        (["tier=tape"], "no tier 'tape'; allowed: disk"),
        (["accessed=7d"], "accessed=: allowed are > >= < <="),
        (["accessed>soon"], "allowed are ages (7d, 12h, 30m) and times"),
        (["created>99999-01-01"], "allowed are ages"),
        (["pinned=perhaps"], "pinned: 'perhaps'; allowed: true, false"),
        (["shard=1"], "shard: '1'; allowed is RANKofSIZE"),
        (["model=abc"], "8 or more hex digits of a source id"),
        (["salt=@/no/such/file"], "No such file"),
        (["--sort", "sise"], "not an order: 'sise'"),
        (["--sort", "size:down"], "not an order"),
        (["--limit", "0"], "limit"),
    ],
)
def test_mistakes_are_one_line_that_says_what_is_allowed(root, words, told):
    done = call("store", "ls", "--store", f"disk://{root}", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["ls", "df", "top"])
def test_no_store_is_made_by_looking_for_one(tmp_path, command):
    done = call("store", command, "--store", f"disk://{tmp_path}/typo")
    assert done.returncode == 4
    assert done.stderr == f"error: no store in {tmp_path}/typo\n"
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("tape://x", "unknown tier 'tape'"),
        ("cpu://", "cpu:// ends with its process; allowed: disk://, s3://, droidspeak://"),
        ("disk://relative/x", "relative path"),
        ("disk://~nobody-has-this-name/x", "not a path"),
        ("disk://", "path is missing"),
    ],
)
def test_stores_that_there_are_not(url, told):
    done = call("store", "ls", "--store", url)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_formats(root):
    store = "--store", f"disk://{root}"
    found = json.loads(call("store", "ls", *store, "--format", "json").stdout)
    assert found["version"] == 1
    assert found["chunks"] == rows(call("store", "ls", *store, "--format", "jsonl"))
    keys = call("store", "ls", *store, "--format", "quiet").stdout.split()
    assert keys == [row["key"] for row in found["chunks"]]
    row = next(row for row in found["chunks"] if row["key"] == str(CHUNKS[1].key))
    assert row["slots"] == CHUNKS[1].header.slot_bytes._asdict()
    assert (row["e_layers"], row["pinned"], row["tier"], row["salt"]) == ([2], True, "disk", "")
    assert row["created"] == row["used"]
    assert row["created"].endswith("Z")
    table = call("store", "ls", *store).stdout.splitlines()
    assert table[0].split()[:4] == ["SOURCE", "SHARD", "PREFIX", "TOKENS"]
    assert len(table) == 7
    empty = "--filter", "tokens>1000"
    assert call("store", "ls", *store, *empty).stdout == ""
    assert json.loads(call("store", "ls", *store, *empty, "--format", "json").stdout)["chunks"] == []


def test_a_reader_that_has_seen_enough(root):
    with DiskTier(root, min_free=0) as tier:
        for seed in range(10, 400):  # more than a pipe holds
            tier.write(make_chunk(seed, layers=1))
    command = f"{sys.executable} -m droidspeak store ls --store disk://{root} --format jsonl | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    command = f"{sys.executable} -m droidspeak store df --store disk://{root} | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_store_that_an_engine_has_open(root):
    with DiskTier(root, min_free=0) as engine:
        marks = set((root / "writers").iterdir())
        engine.write(make_chunk(9))
        assert len(rows(call("store", "ls", "--store", f"disk://{root}", "--format", "jsonl"))) == 7
        # Looking leaves no mark, and the engine goes on.
        assert set((root / "writers").iterdir()) == marks
        engine.write(make_chunk(10))


def test_a_folder_whose_catalog_is_gone_or_older(root):
    for path in root.glob("catalog.sqlite*"):
        path.unlink()
    assert set(listed(root)) == {0, 1, 2, 3, 4, 5}


# The configured store


def test_the_configured_store_without_what_ends_with_a_process(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DROIDSPEAK_TIERS", f"cpu:// disk://{root}?capacity=1MiB&name=ssd")
    found = json.loads(call("store", "df", "--format", "json").stdout)
    assert [(row["tier"], row["capacity"]) for row in found["tiers"]] == [("ssd", 1 << 20)]
    monkeypatch.setenv("DROIDSPEAK_TIERS", "cpu://")
    done = call("store", "df")
    assert done.returncode == 2
    assert "--store URL" in done.stderr
    (tmp_path / "c.yaml").write_text(f"tiers: ['disk://{root}']")
    monkeypatch.delenv("DROIDSPEAK_TIERS")
    assert len(rows(call("store", "ls", "--config", tmp_path / "c.yaml", "--format", "jsonl"))) == 6


def test_two_tiers_of_one_kind_have_two_names(root, tmp_path):
    with DiskTier(tmp_path / "other", min_free=0) as tier:
        tier.write(CHUNKS[0])
    stores = "--store", f"disk://{root}", "--store", f"disk://{tmp_path}/other"
    found = rows(call("store", "ls", *stores, "--format", "jsonl", "--sort", "created"))
    assert [row["tier"] for row in found] == ["disk"] * 6 + ["disk-2"]
    assert len(rows(call("store", "ls", *stores, "--format", "jsonl", "tier=disk-2"))) == 1
    assert len(rows(call("store", "ls", *stores, "--format", "jsonl", "--limit", "3"))) == 3


# Other kinds of stores


@pytest.fixture
def bucket(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[str]:
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="inventory")
    yield f"s3://inventory/p?endpoint={s3_endpoint}&region=us-east-1"
    for row in client.list_objects_v2(Bucket="inventory").get("Contents", []):
        client.delete_object(Bucket="inventory", Key=row["Key"])
    client.delete_bucket(Bucket="inventory")
    client.close()


def test_a_bucket(bucket):
    from droidspeak.storage.urls import open_tier

    with open_tier(bucket) as tier:
        for chunk in CHUNKS:
            tier.write(chunk)
    found = {row["key"]: row for row in rows(call("store", "ls", "--store", bucket, "--format", "jsonl"))}
    assert found.keys() == {str(chunk.key) for chunk in CHUNKS}
    row = found[str(CHUNKS[3].key)]
    assert (row["salt"], row["e_layers"], row["used"], row["pinned"]) == (salt_tag(TENANT), [2], None, None)
    assert row["slots"] == CHUNKS[3].header.slot_bytes._asdict()
    assert row["created"]
    kept = rows(
        call("store", "ls", "--store", bucket, "--format", "jsonl", "size>1", "e=2", "--sort", "size")
    )
    assert len(kept) == 3
    document = json.loads(call("store", "df", "-v", "--store", bucket, "--format", "json").stdout)
    assert document["tiers"][0] == {
        "tier": "s3",
        "answers": True,
        "chunks": 6,
        "bytes": sum(chunk.header.nbytes for chunk in CHUNKS),
        "capacity": None,
        "reclaimable": None,
    }
    shown = json.loads(call("store", "show", CHUNKS[3].key, "--store", bucket, "--format", "json").stdout)
    assert shown["digest"] == CHUNKS[3].header.digest


def test_a_daemon(tmp_path):
    store = TieredStore([MemoryTier(1 << 20), DiskTier(tmp_path / "d", min_free=0, capacity=1 << 20)])
    for chunk in CHUNKS:
        store.write(chunk)
    assert store.flush()
    store.pin(CHUNKS[2].key)
    with serving(store) as port:
        url = f"droidspeak://127.0.0.1:{port}"
        found = rows(call("store", "ls", "--store", url, "--format", "jsonl"))
        assert sorted(row["tier"] for row in found) == ["remote/cpu"] * 6 + ["remote/disk"] * 6
        assert {row["key"] for row in found if row["pinned"]} == {str(CHUNKS[2].key)}
        of_disk = rows(call("store", "ls", "--store", url, "--format", "jsonl", "tier=remote/disk", "e=2"))
        assert len(of_disk) == 3
        assert len(rows(call("store", "ls", "--store", url, "--format", "jsonl", "tier=remote"))) == 12
        document = json.loads(call("store", "df", "--store", url, "--format", "json").stdout)
        assert [row["tier"] for row in document["tiers"]] == ["remote/cpu", "remote/disk"]
        held = sum(chunk.header.nbytes for chunk in CHUNKS)
        assert document["tiers"][1]["reclaimable"] == held - CHUNKS[2].header.nbytes
        shown = json.loads(call("store", "show", CHUNKS[3].key, "--store", url, "--format", "json").stdout)
        assert [row["tier"] for row in shown["tiers"]] == ["remote/cpu", "remote/disk"]


# top, df


def test_top(root):
    store = "--store", f"disk://{root}", "--format", "jsonl"
    assert [row["hits"] for row in rows(call("store", "top", *store, "--by", "hits"))] == [1, 0, 0, 0, 0, 0]
    oldest = rows(call("store", "top", *store, "--by", "age", "--limit", "2"))
    assert [row["key"] for row in oldest] == [str(CHUNKS[0].key), str(CHUNKS[1].key)]
    sizes = [row["bytes"] for row in rows(call("store", "top", *store, "--filter", "codec=raw"))]
    assert sizes == sorted((c.header.nbytes for c in CHUNKS[:5]), reverse=True)


def test_df(root, policies):
    store = "--store", f"disk://{root}?capacity=1MiB"
    document = json.loads(call("store", "df", "-v", *store, "--format", "json").stdout)
    nbytes = sum(chunk.header.nbytes for chunk in CHUNKS)
    assert document["tiers"] == [
        {
            "tier": "disk",
            "answers": True,
            "chunks": 6,
            "bytes": nbytes,
            "capacity": 1 << 20,
            "reclaimable": nbytes - CHUNKS[1].header.nbytes,
        }
    ]
    base = document["sources"][0]
    assert (base["source"], base["model"], base["chunks"]) == (SENDER.source_id, "base", 4)
    assert base["slots"] == {
        kind: sum(chunk.header.slot_bytes._asdict()[kind] for chunk in CHUNKS[:4]) for kind in "kve"
    }
    quick = json.loads(call("store", "df", *store, "--format", "json").stdout)
    assert [row["slots"] for row in quick["sources"]] == [None, None]
    table = call("store", "df", "-v", *store).stdout
    assert "base" in table
    assert "1.0 MiB" in table
    assert call("store", "df", *store, "--format", "quiet").stdout == ""


def test_df_tells_of_the_tiers_that_answer_and_fails_for_the_other(root):
    dead = f"droidspeak://127.0.0.1:{closed_port()}"
    stores = "--store", f"disk://{root}", "--store", dead
    done = call("store", "df", *stores, "--format", "json")
    assert done.returncode == 5
    assert [row["answers"] for row in json.loads(done.stdout)["tiers"]] == [True, False]
    assert done.stderr.count("\n") == 1
    assert "refused" in done.stderr
    done = call("store", "ls", "--store", dead)
    assert (done.returncode, done.stdout) == (5, "")


# show


def test_show(root, policies):
    store = "--store", f"disk://{root}"
    key = CHUNKS[3].key
    shown = json.loads(call("store", "show", key.prefix[:10], *store, "--format", "json").stdout)
    header = CHUNKS[3].header
    assert (shown["key"], shown["model"], shown["tokens"], shown["bytes"]) == (
        str(key),
        "base",
        16,
        header.nbytes,
    )
    assert (shown["kv_layers"], shown["e_layers"]) == ([0, 1, 2, 3], [2])
    assert (shown["salt"], shown["labels"]) == (salt_tag(TENANT), {"salt": salt_tag(TENANT)})
    assert len(shown["slots"]) == 9
    assert shown["slots"][0]["slot"] == "e.2"
    assert shown["slots"][0]["dtype"] == "bfloat16"
    assert shown["slots"][0]["xxh3_64"] == f"{next(iter(header.records.values())).checksum:016x}"
    assert [row["tier"] for row in shown["tiers"]] == ["disk"]
    (policy,) = shown["policies"]
    assert (policy["receiver"], policy["model"], policy["usable"]) == (RECEIVER.source_id, "tuned", True)
    without = json.loads(call("store", "show", CHUNKS[2].key, *store, "--format", "json").stdout)
    assert [plan["missing_e"] for plan in without["policies"][0]["plans"]] == [[2]]
    assert not without["policies"][0]["usable"]
    table = call("store", "show", key, *store).stdout
    assert "layers 0-3" in table
    assert "tuned" in table
    assert call("store", "show", key.prefix[:10], *store, "--format", "quiet").stdout == f"{key}\n"


def test_showing_is_no_use(root):
    before = call("store", "ls", "--store", f"disk://{root}", "--format", "json").stdout
    call("store", "show", CHUNKS[0].key, "--store", f"disk://{root}")
    assert call("store", "ls", "--store", f"disk://{root}", "--format", "json").stdout == before


@pytest.mark.parametrize(
    ("key", "status", "told"),
    [
        (str(make_key(77)), 4, "no chunk"),
        ("ffffffffffffffff", 4, "no chunk ffffffffffffffff in disk"),
        ("", 2, "not a key"),
        ("xyz", 2, "not a key: 'xyz'"),
        ("a/b/c/d", 2, "not a key"),
        ("a/b", 2, "not a key"),
    ],
)
def test_keys_that_there_are_not(root, key, status, told):
    done = call("store", "show", key, "--store", f"disk://{root}")
    assert (done.returncode, done.stdout) == (status, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_beginning_of_several_keys(root):
    with DiskTier(root, min_free=0) as tier:
        twin = ChunkKey(CHUNKS[0].key.source, "0of1", CHUNKS[0].key.prefix[:20] + "0" * 44)
        tier.write(make_chunk(0, key=twin))
    done = call("store", "show", twin.prefix[:20], "--store", f"disk://{root}")
    assert done.returncode == 2
    assert "the beginning of several keys" in done.stderr


def test_a_chunk_whose_file_is_damaged(root):
    with DiskTier(root, read_only=True) as tier:
        path = tier.path(CHUNKS[0].key)
    path.write_bytes(path.read_bytes()[:100])
    done = call("store", "show", CHUNKS[0].key, "--store", f"disk://{root}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error:" in done.stderr

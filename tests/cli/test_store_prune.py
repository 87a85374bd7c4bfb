"""`droidspeak store prune`, `purge`, `rm`, `pin` and `unpin`."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from droidspeak.storage.disk import DiskTier
from droidspeak.storage.testing import make_chunk, make_key
from tests.cli.commandline import call
from tests.storage.children import running, started, write_and_evict

SIZE = make_chunk(0).header.nbytes
SOURCES = [make_key(0, source=source).source for source in (0, 1)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with DiskTier(tmp_path / "store", min_free=0) as tier:
        for seed in range(6):
            tier.write(make_chunk(seed, key=make_key(seed, source=seed % 2)))
    return tmp_path / "store"


def held(root: Path) -> set[int]:
    known = {make_key(seed, source=seed % 2): seed for seed in range(6)}
    with DiskTier(root, read_only=True) as tier:
        return {known[key] for key in list(tier.keys())}


def store(command: str, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return call("store", command, "--store", f"disk://{root}", *words)


def test_without_a_terminal_nothing_leaves_unless_told(root: Path) -> None:
    done = store("prune", root, "--model", SOURCES[1][:12])
    assert done.returncode == 6
    assert "3 chunks, 6.0 KiB" in done.stderr
    assert "go ahead with -y" in done.stderr
    assert held(root) == set(range(6))
    done = store("prune", root, "--model", SOURCES[1][:12], "-y", "--format", "json")
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert (told["chunks"], told["bytes"], told["dry_run"]) == (3, 3 * SIZE, False)
    (tier,) = told["tiers"]
    assert tier["sources"] == [{"source": SOURCES[1], "model": None, "chunks": 3, "bytes": 3 * SIZE}]
    assert held(root) == {0, 2, 4}


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 6), ("\n", 6), ("\x04", 130)])
def test_on_a_terminal_it_asks(root: Path, answer: str, status: int) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "droidspeak", "store", "prune", "--store", f"disk://{root}"]
    process = subprocess.Popen(
        [*command, "--max-size", "0"], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.write(ours, answer.encode())
    out, err = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == status
    assert "Let 6 objects, 12.0 KiB, leave?" in err
    assert "Let" not in out
    assert held(root) == (set() if status == 0 else set(range(6)))


def test_dry_run(root: Path) -> None:
    done = store("prune", root, "--max-size", "5KiB", "--dry-run", "--format", "json")
    assert json.loads(done.stdout)["chunks"] == 4
    assert held(root) == set(range(6))


def test_conditions_are_all_met_by_what_leaves(root: Path) -> None:
    assert store("prune", root, "--older-than", "1h", "-y").returncode == 0
    assert held(root) == set(range(6))
    words = ["size>1KiB", "--model", SOURCES[0], "--filter", "tokens=16", "--max-size", "10KiB", "-y"]
    assert store("prune", root, *words).returncode == 0
    assert held(root) == {1, 2, 3, 4, 5}


def test_nothing_to_do(root: Path) -> None:
    done = store("prune", root, "--older-than", "1h")
    assert done.returncode == 0
    assert "nothing to remove" in done.stderr


def test_pinned_chunks_stay_unless_told(root: Path) -> None:
    assert store("pin", root, str(make_key(0))).returncode == 0
    store("prune", root, "--max-size", "0", "-y")
    assert held(root) == {0}
    store("prune", root, "--max-size", "0", "--pinned", "-y")
    assert held(root) == set()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "prune what?"),
        (["--older-than", "7"], "7d"),
        (["--max-size", "much"], "GiB"),
        (["--salt", "secret"], "16 hex digits"),
        (["--model", "xyz"], "source id"),
        (["--filter", "colour=red"], "allowed"),
    ],
)
def test_calls_that_are_wrong(root: Path, words: list[str], told: str) -> None:
    done = store("prune", root, *words, "-y")
    assert done.returncode == 2
    assert told in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert held(root) == set(range(6))


def test_leftovers_and_orphans(root: Path) -> None:
    with DiskTier(root, min_free=0) as tier:
        lost = tier.path(make_key(0)).with_name(f".{make_key(0).prefix}.12345-abcdef01.0.tmp")
        lost.write_bytes(b"half a chunk")
        with tier.exclusively() as catalog:
            catalog.remove(make_key(2))
        tier.path(make_key(4)).unlink()
    dry = json.loads(
        store("prune", root, "--orphans", "--incomplete", "--dry-run", "--format", "json").stdout
    )
    assert dry["tiers"][0]["incomplete"] == 1
    assert dry["tiers"][0]["orphans"] == 2
    done = json.loads(store("prune", root, "--incomplete", "-y", "--format", "json").stdout)
    assert (done["tiers"][0]["incomplete"], done["tiers"][0]["orphans"]) == (1, 0)
    assert not lost.exists()
    assert store("prune", root, "--orphans", "-y").returncode == 0
    assert held(root) == {0, 1, 3, 5}
    assert store("verify", root).returncode == 0
    assert len(list((root / "chunks").rglob("*.safetensors"))) == 4


def test_purge(root: Path) -> None:
    store("pin", root, str(make_key(2)))
    assert store("purge", root, "--source", SOURCES[0]).returncode == 6
    done = store("purge", root, "--source", SOURCES[0][:10], "-y", "--format", "json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["chunks"] == 3
    assert held(root) == {1, 3, 5}
    assert store("purge", root, "--source", SOURCES[0], "-y").returncode == 4
    assert store("purge", root, "--source", "zzz", "-y").returncode == 2


def test_rm(root: Path) -> None:
    store("pin", root, str(make_key(0)))
    gone = make_key(99)
    done = store("rm", root, str(make_key(0)), str(gone), make_key(2).prefix[:10], "ffffffffff")
    assert done.returncode == 4
    assert str(gone) in done.stderr
    assert "ffffffffff" in done.stderr
    assert held(root) == {1, 3, 4, 5}
    done = store("rm", root, str(make_key(4)), str(make_key(4)), "--format", "json")
    assert json.loads(done.stdout) == {
        "version": 1,
        "chunks": [{"key": str(make_key(4)), "tiers": ["disk"]}],
    }
    assert store("rm", root, "not/a/key").returncode == 2
    assert store("rm", root, "xyz").returncode == 2


def test_pin_and_unpin(root: Path) -> None:
    assert store("pin", root, make_key(0).prefix, make_key(2).prefix).returncode == 0
    assert store("unpin", root, make_key(2).prefix).returncode == 0
    assert store("pin", root, "ffffffffff").returncode == 4
    with DiskTier(root, min_free=0) as tier:
        tier.evict(1 << 40)
    assert held(root) == {0}


def test_beside_a_process_that_writes(root: Path) -> None:
    with running(write_and_evict, root, 100, 140, None) as process:
        started(root, 100)
        for _ in range(5):
            assert store("prune", root, "--max-size", "10KiB", "-y").returncode == 0
            assert store("verify", root).returncode == 0
        assert process.is_alive()

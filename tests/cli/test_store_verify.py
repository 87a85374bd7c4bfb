"""`droidspeak store verify` and the repair."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from droidspeak.storage import TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.testing import make_chunk, make_key
from tests.cli.commandline import call
from tests.storage.children import running, started, write_and_evict
from tests.storage.daemons import closed_port, serving


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with DiskTier(tmp_path / "store", min_free=0) as tier:
        for seed in range(6):
            tier.write(make_chunk(seed))
    return tmp_path / "store"


def damage(root: Path) -> None:
    with DiskTier(root, read_only=True) as tier:
        paths = [tier.path(make_key(seed)) for seed in range(6)]
    data = bytearray(paths[0].read_bytes())
    data[-1] ^= 1
    paths[0].write_bytes(data)
    os.truncate(paths[1], 700)
    paths[2].unlink()


def test_sound_store(root: Path) -> None:
    done = call("store", "verify", "--full", "--store", f"disk://{root}")
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing found; 6 chunks" in done.stderr


def test_findings_and_repair(root: Path) -> None:
    damage(root)
    quick = call("store", "verify", "--store", f"disk://{root}")
    assert quick.returncode == 3
    assert {line.split()[1] for line in quick.stdout.splitlines()[1:]} == {"truncated", "orphan_row"}
    done = call("store", "verify", "--full", "--repair", "--store", f"disk://{root}", "--format", "json")
    assert done.returncode == 3
    told = json.loads(done.stdout)
    assert {finding["kind"]: finding["repair"] for finding in told["findings"]} == {
        "corrupt": "quarantined",
        "truncated": "quarantined",
        "orphan_row": "removed",
    }
    assert (told["repaired"], told["full"], told["sample"]) == (3, True, 1.0)
    assert "3 findings, 3 of them repaired" in done.stderr
    assert call("store", "verify", "--full", "--store", f"disk://{root}").returncode == 0


def test_lines_of_json_and_bare_places(root: Path) -> None:
    damage(root)
    lines = call("store", "verify", "--full", "--store", f"disk://{root}", "--format", "jsonl").stdout
    assert {json.loads(line)["kind"] for line in lines.splitlines()} == {
        "corrupt",
        "truncated",
        "orphan_row",
    }
    bare = call("store", "verify", "--full", "--store", f"disk://{root}", "--format", "quiet").stdout
    assert all((root / line).parent.is_dir() for line in bare.splitlines())


@pytest.mark.parametrize("share", ["0", "0%", "101%", "-3%", "x", "", "5%%", "nan", "1e3"])
def test_shares_that_are_none(root: Path, share: str) -> None:
    done = call("store", "verify", f"--sample={share}", "--store", f"disk://{root}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --sample")
    assert len(done.stderr.splitlines()) == 1


def test_sample(root: Path) -> None:
    done = call("store", "verify", "--sample", "50%", "--store", f"disk://{root}")
    assert done.returncode == 0
    assert "a sample of 50 %" in done.stderr


def test_no_store_and_no_daemon(tmp_path: Path, root: Path) -> None:
    assert call("store", "verify", "--store", f"disk://{tmp_path}/nothing").returncode in (4, 5)
    assert not (tmp_path / "nothing").exists()
    done = call(
        "store", "verify", "--store", f"droidspeak://127.0.0.1:{closed_port()}", "--store", f"disk://{root}"
    )
    assert done.returncode == 5
    # The other tier is looked at all the same.
    assert "6 chunks" in done.stderr


def test_daemon(root: Path) -> None:
    damage(root)
    with serving(TieredStore([DiskTier(root, min_free=0)])) as port:
        done = call(
            "store", "verify", "--full", "--store", f"droidspeak://127.0.0.1:{port}", "--format", "quiet"
        )
        assert done.returncode == 3
        assert str(make_key(0)) in done.stdout.split()


def test_beside_a_process_that_writes(root: Path) -> None:
    with running(write_and_evict, root, 100, 140, None) as process:
        started(root, 100)
        for _ in range(5):
            done = call("store", "verify", "--full", "--store", f"disk://{root}")
            assert (done.returncode, done.stdout) == (0, "")
        assert process.is_alive()
    # It was killed: what it left is found, repaired, and then gone.
    assert call("store", "verify", "--repair", "--store", f"disk://{root}").returncode in (0, 3)
    assert call("store", "verify", "--full", "--store", f"disk://{root}").returncode == 0

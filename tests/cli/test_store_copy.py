"""`droidspeak store copy`, `export` and `import`."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from droidspeak.integrations.cli.store.showing import size_text
from droidspeak.storage import TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.testing import assert_holds, make_chunk, make_key
from tests.cli.commandline import call
from tests.storage.children import running, started, write_and_evict
from tests.storage.daemons import closed_port, serving

SIZE = make_chunk(0).header.nbytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with DiskTier(tmp_path / "store", min_free=0) as tier:
        for seed in range(6):
            tier.write(make_chunk(seed, key=make_key(seed, source=seed % 2)))
    return tmp_path / "store"


def assert_all(root: Path, seeds: range = range(6)) -> None:
    with DiskTier(root, read_only=True) as tier:
        for seed in seeds:
            key = make_key(seed, source=seed % 2)
            assert_holds(tier.read(key), make_chunk(seed, key=key))


def told(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    document = json.loads(done.stdout)
    return {name: document[name]["chunks"] for name in ("copied", "held", "gone")}


def test_copy(root: Path, tmp_path: Path) -> None:
    words = ["store", "copy", f"disk://{root}", f"disk://{tmp_path}/to", "--format", "json"]
    dry = call(*words, "--dry-run")
    assert dry.returncode in (0, 4)
    assert not (tmp_path / "to").exists()
    done = call(*words)
    assert done.returncode == 0
    assert told(done) == {"copied": 6, "held": 0, "gone": 0}
    assert json.loads(done.stdout)["copied"]["bytes"] == 6 * SIZE
    assert_all(tmp_path / "to")
    assert told(call(*words)) == {"copied": 0, "held": 6, "gone": 0}
    assert told(call(*words, "--dry-run")) == {"copied": 0, "held": 6, "gone": 0}


def test_copy_of_some(root: Path, tmp_path: Path) -> None:
    source = make_key(0, source=1).source
    words = ["--filter", f"model={source}", "--transfers", "2", "--bwlimit", "1GiB"]
    done = call("store", "copy", f"disk://{root}", f"disk://{tmp_path}/to", *words, "--format", "json")
    assert told(done)["copied"] == 3


def test_copy_to_a_daemon_and_to_s3(root: Path, tmp_path: Path, s3_endpoint: str) -> None:
    import boto3

    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="clicopy")
    bucket = f"s3://clicopy/some?endpoint={s3_endpoint}"
    with serving(TieredStore([MemoryTier(1 << 20)])) as port:
        daemon = f"droidspeak://127.0.0.1:{port}"
        for one, other in ((f"disk://{root}", bucket), (bucket, daemon), (daemon, f"disk://{tmp_path}/to")):
            done = call("store", "copy", one, other, "--format", "json")
            assert told(done) == {"copied": 6, "held": 0, "gone": 0}
    assert_all(tmp_path / "to")


def test_damaged_chunks_are_named_and_the_rest_is_copied(root: Path, tmp_path: Path) -> None:
    with DiskTier(root, read_only=True) as tier:
        path = tier.path(make_key(0))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = call("store", "copy", f"disk://{root}", f"disk://{tmp_path}/to", "--format", "json")
    assert done.returncode == 1
    assert [row["key"] for row in json.loads(done.stdout)["failed"]] == [str(make_key(0))]
    assert "differs from its checksum" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: 1 chunk could not be copied"
    assert_all(tmp_path / "to", range(1, 6))


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["disk:///nowhere/at/all", "disk://{to}"], 4),
        (["disk://{root}", "cpu://"], 2),
        (["disk://{root}", "ftp://x"], 2),
        (["disk://{root}", "disk://{to}", "--bwlimit", "0"], 2),
        (["disk://{root}", "disk://{to}", "--bwlimit", "fast"], 2),
        (["disk://{root}", "disk://{to}", "--transfers", "0"], 2),
        (["disk://{root}", f"droidspeak://127.0.0.1:{closed_port()}"], 5),
    ],
)
def test_calls_that_cannot_be(root: Path, tmp_path: Path, words: list[str], status: int) -> None:
    done = call("store", "copy", *(word.format(root=root, to=tmp_path / "to") for word in words))
    assert done.returncode == status
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_what_was_copied_before_a_failure_is_told(root: Path, tmp_path: Path) -> None:
    with DiskTier(root, min_free=0) as tier:
        tier.write(make_chunk(8, tokens=256))
    small = f"disk://{tmp_path}/to?capacity={3 * SIZE}"
    done = call("store", "copy", f"disk://{root}", small, "--transfers", "1", "--format", "json")
    assert done.returncode == 1
    assert "the capacity is" in done.stderr.splitlines()[-1]
    assert json.loads(done.stdout)["failed"] == []


def test_small_destination_is_warned_of(root: Path, tmp_path: Path) -> None:
    done = call("store", "copy", f"disk://{root}", f"disk://{tmp_path}/to?capacity={3 * SIZE}")
    assert "warning: 12.0 KiB to copy" in done.stderr


def test_interrupted_copy_leaves_whole_chunks_and_goes_on(root: Path, tmp_path: Path) -> None:
    with DiskTier(root, min_free=0) as tier:
        for seed in range(6, 60):
            tier.write(make_chunk(seed, key=make_key(seed, source=seed % 2)))
    to = tmp_path / "to"
    words = ["store", "copy", f"disk://{root}", f"disk://{to}"]
    command = [sys.executable, "-m", "droidspeak", *words, "--bwlimit", str(4 * SIZE), "--transfers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(to.rglob("*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not list(to.rglob("*.tmp"))
    assert call("store", "verify", "--full", "--store", f"disk://{to}").returncode == 0
    held = len(list(to.rglob("*.safetensors")))
    assert 0 < held < 60
    assert told(call(*words, "--format", "json")) == {"copied": 60 - held, "held": held, "gone": 0}
    assert_all(to, range(60))


def test_copy_beside_a_process_that_writes_and_evicts(root: Path, tmp_path: Path) -> None:
    with running(write_and_evict, root, 100, 140, 20 * SIZE) as process:
        started(root, 100)
        for _ in range(5):
            assert call("store", "copy", f"disk://{root}", f"disk://{tmp_path}/to").returncode == 0
        assert process.is_alive()
    assert call("store", "verify", "--full", "--store", f"disk://{tmp_path}/to").returncode == 0


def test_export_and_import(root: Path, tmp_path: Path) -> None:
    archive = tmp_path / "all.tar"
    done = call("store", "export", archive, "--store", f"disk://{root}", "--format", "json")
    assert done.returncode == 0
    assert told(done)["copied"] == 6
    with tarfile.open(archive) as file:
        assert len(file.getnames()) == 6
    words = ["store", "import", archive, "--store", f"disk://{tmp_path}/to", "--format", "json"]
    assert told(call(*words)) == {"copied": 6, "held": 0, "gone": 0}
    assert_all(tmp_path / "to")
    assert told(call(*words)) == {"copied": 0, "held": 6, "gone": 0}


def test_export_does_not_replace_unless_told(root: Path, tmp_path: Path) -> None:
    archive = tmp_path / "all.tar"
    archive.write_text("mine")
    assert call("store", "export", archive, "--store", f"disk://{root}").returncode == 2
    assert archive.read_text() == "mine"
    assert call("store", "export", archive, "--force", "--store", f"disk://{root}").returncode == 0
    assert tarfile.is_tarfile(archive)
    assert call("store", "export", tmp_path / "no" / "a.tar", "--store", f"disk://{root}").returncode == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.tar", "store"]


@contextmanager
def hanging(root: Path, archive: Path) -> Iterator[subprocess.Popen[str]]:
    """An export, a process of its own, that has begun to write and waits for one of the chunks."""
    with DiskTier(root, min_free=0) as tier:
        for seed in range(6):
            tier.write(make_chunk(seed, key=make_key(seed, source=seed % 2), tokens=512))
        path = tier.path(sorted(tier.keys(), key=str)[3])
    path.rename(path.with_suffix(".aside"))
    os.mkfifo(path)
    command = [sys.executable, "-m", "droidspeak", "store", "export", archive, "--store", f"disk://{root}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        partial = archive.with_name(f"{archive.name}.partial")
        while not partial.exists() or partial.stat().st_size < 2 * (
            path.with_suffix(".aside").stat().st_size
        ):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()
        path.with_suffix(".aside").replace(path)


def export_of(archive: Path) -> dict[str, bytes]:
    """Names and bytes of the members."""
    with tarfile.open(archive) as file:
        opened = {member.name: file.extractfile(member) for member in file.getmembers()}
        return {name: content.read() for name, content in opened.items() if content}


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_an_export_that_was_broken_off_goes_on(root: Path, tmp_path: Path, by: signal.Signals) -> None:
    archive, whole = tmp_path / "all.tar", tmp_path / "whole.tar"
    words = ["--store", f"disk://{root}", "--format", "json"]
    with hanging(root, archive) as process:
        second = call("store", "export", archive, *words)
        assert (second.returncode, second.stdout) == (1, "")
        assert second.stderr == f"error: {archive}.partial: another export is writing it\n"
        process.send_signal(by)
        if by is signal.SIGINT:
            # It waits for the chunks under way, and one of them for a writer.
            (fifo,) = (path for path in root.rglob("*.safetensors") if path.is_fifo())
            fifo.write_bytes(b"")
        out, err = process.communicate(timeout=60)
        assert out == ""
        if by is signal.SIGINT:
            assert process.returncode == 130
            assert err == f"{archive}.partial stays: the same command goes on with it\ninterrupted\n"
    assert not archive.exists()
    done = call("store", "export", archive, *words)
    assert done.returncode == 0
    document = json.loads(done.stdout)
    held = document["held"]["chunks"]
    assert 2 <= held <= 3
    assert told(done) == {"copied": 6 - held, "held": held, "gone": 0}
    assert (
        done.stderr == f"{archive}.partial: {held} chunks, {size_text(document['held']['bytes'])} are kept\n"
    )
    call("store", "export", whole, *words)
    assert export_of(archive) == export_of(whole)
    assert call("store", "import", archive, "--store", f"disk://{tmp_path}/to").returncode == 0
    assert call("store", "verify", "--full", "--store", f"disk://{tmp_path}/to").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.tar", "store", "to", "whole.tar"]


def test_an_export_for_which_there_is_no_room_goes_on(root: Path, tmp_path: Path) -> None:
    archive = tmp_path / "all.tar"
    words = ["store", "export", archive, "--store", f"disk://{root}", "--format", "json"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * (SIZE + 512), before[1]))
    try:
        done = call(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"{archive}.partial stays: the same command goes on with it",
        f"error: {archive}: File too large",
    ]
    document = told(call(*words))
    assert document["held"] > 0
    assert document["held"] + document["copied"] == 6
    assert len(export_of(archive)) == 6


def test_a_partial_file_of_somebody_else_is_left_alone(root: Path, tmp_path: Path) -> None:
    archive, partial = tmp_path / "all.tar", tmp_path / "all.tar.partial"
    partial.write_text("mine")
    done = call("store", "export", archive, "--store", f"disk://{root}")
    assert (done.returncode, partial.read_text()) == (2, "mine")
    assert done.stderr == f"error: {partial} is no export that was broken off; allowed is to remove it\n"


def test_a_tier_that_is_down_keeps_its_exit_status(root: Path, tmp_path: Path) -> None:
    done = call("store", "export", tmp_path / "a.tar", "--store", f"droidspeak://127.0.0.1:{closed_port()}")
    assert done.returncode == 5
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


def test_through_a_pipe(root: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "droidspeak", "store"]
    exporting = subprocess.run(
        [*program, "export", "-", "--store", f"disk://{root}"], capture_output=True, check=True
    )
    assert b"6 chunks" in exporting.stderr
    importing = subprocess.run(
        [*program, "import", "-", "--store", f"disk://{tmp_path}/to"],
        input=exporting.stdout,
        capture_output=True,
        check=True,
    )
    assert b"copied" in importing.stdout
    assert_all(tmp_path / "to")


def test_cut_archive(root: Path, tmp_path: Path) -> None:
    archive = tmp_path / "all.tar"
    call("store", "export", archive, "--store", f"disk://{root}")
    archive.write_bytes(archive.read_bytes()[: 4 * (SIZE + 512) + 100])
    done = call("store", "import", archive, "--store", f"disk://{tmp_path}/to", "--format", "json")
    assert done.returncode == 1
    assert told(done)["copied"] == 4
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_members_that_are_no_chunks_are_refused(root: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bad.tar"
    with tarfile.open(archive, "w") as file:
        file.add(root / "catalog.sqlite", "../../evil.safetensors")
    done = call("store", "import", archive, "--store", f"disk://{tmp_path}/to")
    assert done.returncode == 1
    assert "refused: '../../evil.safetensors'" in done.stderr
    assert not list(tmp_path.rglob("evil*"))


def test_no_archive(tmp_path: Path, root: Path) -> None:
    assert call("store", "import", tmp_path / "nothing.tar", "--store", f"disk://{root}").returncode == 4
    assert call("store", "import", root, "--store", f"disk://{root}").returncode == 2

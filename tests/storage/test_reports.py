"""Tiers that keep reports: what is put is found, whole or not at all, and folds lose nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest

from droidspeak.connector.reports import Report, encoded, fold_reports, pairs_of, read_reports
from droidspeak.errors import TierFull, TierUnavailable, UsageError
from droidspeak.storage import TieredStore, reports
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.late import LateTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.reports import MOST_REPORT_BYTES, TOTAL, Folded
from droidspeak.storage.s3 import S3Tier
from droidspeak.storage.wrappers import MeteredTier, ReadOnlyTier

from .daemons import serving

KINDS = ["disk", "s3", "remote", "tiered", "wrapped", "late"]


def document(tokens: int = 1, **rest) -> Report:
    now = datetime(2026, 11, 1, tzinfo=UTC)
    pair = {"sender": "a" * 64, "receiver": "b" * 64, "requests": 1, "tokens": tokens}
    content = {"id": uuid.uuid4().hex, "engine": "mine", "started": now, "updated": now, "pairs": [pair]}
    return Report.model_validate({**content, **rest})


def disk(folder) -> DiskTier:
    return DiskTier(folder, min_free=0)


def bucket(endpoint: str, name: str | None = None) -> str:
    import boto3

    name = name or f"reports-{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    return name


@contextmanager
def opened(kind, tmp_path, s3_endpoint):
    """A tier that keeps reports."""
    if kind == "remote":
        from droidspeak.storage.remote import RemoteTier

        with serving(TieredStore([disk(tmp_path)])) as port, RemoteTier("127.0.0.1", port) as tier:
            yield tier
        return
    made = {
        "disk": lambda: disk(tmp_path),
        "s3": lambda: S3Tier(bucket(s3_endpoint), "folder", endpoint=s3_endpoint),
        "tiered": lambda: TieredStore([MemoryTier(1 << 20), disk(tmp_path)]),
        "wrapped": lambda: MeteredTier(disk(tmp_path)),
        "late": lambda: LateTier(lambda: disk(tmp_path), "late"),
    }
    with made[kind]() as tier:
        yield tier


def contents(tier) -> dict[str, dict]:
    found = [(name, json.loads(data)) for name, data in tier.reports()]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_is_found(kind, tmp_path, s3_endpoint):
    with opened(kind, tmp_path, s3_endpoint) as tier:
        assert contents(tier) == {}
        one, other = document(1), document(2)
        for report in (one, other):
            assert tier.put_report(report.id, encoded(report)) is True
        newer = one.model_copy(update={"pid": 7})
        assert tier.put_report(one.id, encoded(newer))
        expected = {report.id: report.model_dump(mode="json") for report in (newer, other)}
        assert contents(tier) == expected
        # Reports are no chunks.
        assert tier.usage().chunks == 0
        assert list(tier.keys()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "a" * 101, "a.json", "ä", "a\n"])
def test_names_that_are_none(kind, name, tmp_path, s3_endpoint):
    with opened(kind, tmp_path, s3_endpoint) as tier:
        with pytest.raises(UsageError, match="allowed are up to 100 letters"):
            tier.put_report(name, b"{}")
        assert contents(tier) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_is_too_large(kind, tmp_path, s3_endpoint):
    with opened(kind, tmp_path, s3_endpoint) as tier:
        with pytest.raises(UsageError, match=f"allowed are {MOST_REPORT_BYTES}"):
            tier.put_report("a", b" " * (MOST_REPORT_BYTES + 1))
        assert contents(tier) == {}


@pytest.mark.parametrize("kind", ["disk", "s3", "tiered", "wrapped", "late"])
def test_a_fold_makes_many_one(kind, tmp_path, s3_endpoint):
    seen = []

    def fold(documents):
        seen.append(dict(documents))
        return Folded(b'{"sum": 1}', ["a", "b"])

    with opened(kind, tmp_path, s3_endpoint) as tier:
        for name in ("a", "b", "c"):
            tier.put_report(name, b'{"name": 1}')
        tier.fold_reports(lambda _: None)
        assert set(contents(tier)) == {"a", "b", "c"}
        tier.fold_reports(fold)
        assert contents(tier) == {"c": {"name": 1}, TOTAL: {"sum": 1}}
        tier.fold_reports(fold)
        assert [set(documents) for documents in seen] == [{"a", "b", "c"}, {"c", TOTAL}] * (len(seen) // 2)


def test_the_daemon_folds_for_its_clients(tmp_path, s3_endpoint):
    with opened("remote", tmp_path, s3_endpoint) as tier:
        for _ in range(66):
            report = document(ended=True)
            tier.put_report(report.id, encoded(report))
        found = contents(tier)
        assert set(found) > {TOTAL}
        assert len(found) <= 3
        assert sum(report["pairs"][0]["tokens"] for report in found.values()) == 66
        tier.fold_reports(lambda _: pytest.fail("a client folds"))


@pytest.mark.parametrize("kind", ["memory", "read-only disk", "read-only wrapper"])
def test_tiers_that_keep_none(kind, tmp_path):
    with disk(tmp_path) as tier:
        tier.put_report("a", b"{}")
    made = {
        "memory": lambda: MemoryTier(1 << 20),
        "read-only disk": lambda: DiskTier(tmp_path, read_only=True),
        "read-only wrapper": lambda: ReadOnlyTier(disk(tmp_path)),
    }
    with made[kind]() as tier:
        assert tier.put_report("b", b"{}") is False
        tier.fold_reports(lambda _: pytest.fail("what keeps none folds none"))
        assert contents(tier) == ({} if kind == "memory" else {"a": {}})


# Several tiers


def test_the_first_tier_that_keeps_reports_is_the_only_one(tmp_path):
    fast, slow = DiskTier(tmp_path / "fast", min_free=0, name="fast"), disk(tmp_path / "slow")
    with TieredStore([MemoryTier(1 << 20), fast, slow]) as store:
        assert store.put_report("a", b"{}")
        assert (contents(fast), contents(slow)) == ({"a": {}}, {})
        # What another process has left in the slower one is found too.
        slow.put_report("b", b"{}")
        assert set(contents(store)) == {"a", "b"}


def test_a_tier_that_fails_is_not_stood_in_for(tmp_path):
    """Else the same figures would be in two tiers, and be folded in each."""

    def cannot():
        raise TierUnavailable("not mounted")

    slow = disk(tmp_path / "slow")
    with TieredStore([LateTier(cannot, "late"), slow]) as store:
        with pytest.raises(TierUnavailable):
            store.put_report("a", b"{}")
        assert contents(slow) == {}


# In a folder


def test_other_files_in_the_folder_are_passed_over(tmp_path):
    with disk(tmp_path) as tier:
        tier.put_report("a", b"{}")
        for name in (".b.1.new", "c.txt", "d e.json"):
            (tmp_path / "reports" / name).write_text("{}")
        (tmp_path / "reports" / "large.json").write_bytes(b" " * (MOST_REPORT_BYTES + 1))
        assert set(contents(tier)) == {"a"}


def test_a_folder_holds_only_so_many(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "_MOST_REPORTS", 3)
    with disk(tmp_path) as tier:
        for name in ("a", "b", "c", "a"):
            tier.put_report(name, b"{}")
        with pytest.raises(TierFull, match="3 reports are there"):
            tier.put_report("d", b"{}")


def test_a_folder_that_cannot_be_written(tmp_path):
    with disk(tmp_path) as tier:
        (tmp_path / "reports").write_text("a file")
        with pytest.raises(TierUnavailable, match="reports"):
            tier.put_report("a", b"{}")


WRITER = """
import sys
from pathlib import Path
from droidspeak.storage.reports import ReportFolder
folder = ReportFolder(Path(sys.argv[1]))
print("go", flush=True)
number = 0
while True:
    number += 1
    folder.put("busy", b'{"number": %d, "rest": "%s"}' % (number, b"x" * 20000))
"""


def test_a_writer_that_is_killed_leaves_a_whole_document(tmp_path):
    with disk(tmp_path) as tier:
        for _ in range(3):
            writer = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
            )
            assert writer.stdout.readline() == "go\n"
            while not contents(tier):
                pass
            numbers = [contents(tier)["busy"]["number"] for _ in range(20)]
            assert numbers == sorted(numbers)
            writer.kill()
            writer.communicate()
            assert len(contents(tier)["busy"]["rest"]) == 20000
            (tmp_path / "reports" / "busy.json").unlink()


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_who_folds_at_the_same_time_loses_nothing(kind, tmp_path, s3_endpoint, monkeypatch):
    """Each fold adds up what it takes away; on S3 the one that comes second does nothing."""
    monkeypatch.setattr("droidspeak.connector.reports._MOST_DOCUMENTS", 0)
    name = bucket(s3_endpoint) if kind == "s3" else ""
    one_at_a_time = threading.Lock()
    meet = threading.Barrier(4, timeout=60)

    def another():
        if kind == "disk":
            return disk(tmp_path)
        tier = S3Tier(name, endpoint=s3_endpoint)
        put = tier._client.put_object

        def conditional_put(**request):
            # S3 compares and writes in one step, moto in two.
            with one_at_a_time:
                return put(**request)

        tier._client.put_object = conditional_put
        return tier

    def work():
        with another() as tier:
            for n in range(5):
                report = document(10**n, ended=True)
                tier.put_report(report.id, encoded(report))
                meet.wait()
                tier.fold_reports(fold_reports)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    with another() as tier:
        left = dict(tier.reports())
    assert TOTAL in left
    assert sum(pair.tokens for pair in pairs_of(read_reports(left.items()))) == 4 * 11111

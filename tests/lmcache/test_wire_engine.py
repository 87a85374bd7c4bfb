"""The real LMCache engine over `lm://`, against the daemon, which is killed in between."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .processes import ROOT, check, environment, report_of


@contextmanager
def daemon(port: int, folder: Path, log: Path) -> Iterator[int]:
    """A daemon over memory and disk at `port` (0 takes a free one); its port. It ends by SIGKILL."""
    command = [sys.executable, "-m", "droidspeak", "serve", "127.0.0.1", str(port), "--no-http"]
    tiers = ["--tier", "cpu://?capacity=64MiB", "--tier", f"disk://{folder}?capacity=256MiB"]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command + tiers, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(), cwd=ROOT
        ) as process,
    ):
        try:
            assert process.stdout
            for line in process.stdout:
                if ready := re.match(r"READY lm=127\.0\.0\.1:(\d+)", line):
                    yield int(ready[1])
                    break
            else:
                raise AssertionError(f"the daemon did not start: {log.read_text()}")
        finally:
            process.kill()


def test_engines_store_and_retrieve_also_after_the_daemon_was_killed(tmp_path):
    with daemon(0, tmp_path / "store", tmp_path / "first.log") as port:
        check(report_of("wire_cases.py", "store", str(port), tmp_path))
    with daemon(port, tmp_path / "store", tmp_path / "second.log") as again:
        assert again == port
        check(report_of("wire_cases.py", "retrieve", str(port), tmp_path))

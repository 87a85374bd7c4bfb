"""Runs scripts and tools with LMCache, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def environment(**more: str) -> dict[str, str]:
    """Quiet, without telemetry, and with the same hashes of tokens in all processes."""
    quiet = {
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_DISABLE_BANNER": "1",
        "LMCACHE_LOG_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    return {**os.environ, **quiet, **more}


def run(*arguments: str | Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python process with `arguments`, and what it printed."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        env=environment(**env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def report_of(script: str, *arguments: str | Path, **env: str) -> dict[str, str]:
    """The report that a script of cases prints: what came of each case."""
    done = run(HERE / script, *arguments, **env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("REPORT "))


def check(report: dict[str, str]) -> None:
    """Fails with all that went wrong."""
    wrong = [f"{case}:\n{what}" for case, what in report.items() if what != "ok"]
    assert not wrong, "\n".join(wrong)
    assert report

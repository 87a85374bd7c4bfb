"""Profiling time against workers: one pair of the lab, `droidspeak profile` as a user runs it.

`python -m benchmarks.fleet_workers` prints the table that `docs/fleet.md` shows under "Measured".
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import interleaved, machine, table
from lab.train import LAB

_PAIR = ("coder", "base")
_COUNTS = (1, 2)


def _profile(workers: int, found: list[float]) -> Callable[[], None]:
    sender, receiver = _PAIR
    prompts = LAB / "prompts"

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "droidspeak", "profile", "--no-maps", "--no-baselines"]
            command += [
                "--sender",
                str(LAB / "models" / sender),
                "--receiver",
                str(LAB / "models" / receiver),
            ]
            command += ["--calibration", str(prompts / f"{receiver}.calibration.jsonl")]
            command += [
                "--held-out",
                str(prompts / f"{receiver}.jsonl"),
                "--out",
                str(Path(folder) / "policy"),
            ]
            command += ["--max-new-tokens", "8", "--workers", str(workers), "--threads", "1"]
            done = subprocess.run([*command, "--format", "json"], check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout)["work"]["seconds"])

    return call


def main() -> None:
    """Runs each number of workers in turn, three times."""
    measuring: dict[int, list[float]] = {count: [] for count in _COUNTS}
    started = time.monotonic()
    series = interleaved(
        {str(count): _profile(count, measuring[count]) for count in _COUNTS}, rounds=3, warm_up=0
    )
    rows = []
    for count in _COUNTS:
        seconds = sorted(measuring[count])
        rows.append(
            [
                str(count),
                f"{seconds[1]:.1f} ({seconds[0]:.1f}-{seconds[-1]:.1f})",
                f"{sorted(measuring[1])[1] / seconds[1]:.2f}x",
                f"{series[str(count)].median:.1f}",
            ]
        )
    print(f"{machine()}; {time.monotonic() - started:.0f} s\n")
    print(table(["workers", "measuring, s", "speed-up", "whole command, s"], rows))


if __name__ == "__main__":
    main()

"""The fuzz targets, for a bounded number of runs and from a fixed seed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGET = Path(__file__).with_name("wire_atheris.py")
RUNS = 20_000


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
def test_nothing_is_found_on_the_wire(tmp_path):
    command = [
        sys.executable,
        TARGET,
        f"-runs={RUNS}",
        "-seed=1",
        "-max_len=1200",
        f"-artifact_prefix={tmp_path}/",
    ]
    result = subprocess.run(
        [*command, _corpus(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"Done {RUNS} runs" in result.stderr


def _corpus(folder: Path) -> Path:
    """LMCache's own requests, so that the fuzzer need not find the form by itself."""
    corpus = folder / "corpus"
    corpus.mkdir()
    golden = (Path(__file__).parents[1] / "data" / "lm-wire-0.5.6.bin").read_bytes()
    for number in range(18):
        (corpus / str(number)).write_bytes(golden[186 * number : 186 * (number + 1)] + bytes(300))
    return corpus

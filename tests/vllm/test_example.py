"""`examples/vllm_two_servers` does what its page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .processes import ENVIRONMENT

SCRIPT = Path(__file__).parents[2] / "examples" / "vllm_two_servers" / "run.py"

PATIENCE = 580


@pytest.mark.timeout(PATIENCE + 10)
def test_two_servers_share():
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    questions = re.findall(r"^Q: .*\(expected: (.*)\)$", done.stdout, re.MULTILINE)
    shared = re.findall(
        r"^  (.*?) +applied, cross_model_hit: plan 0-2, \d+ tokens shared", done.stdout, re.MULTILINE
    )
    alone = re.findall(r"^  (.*?) +without the store:", done.stdout, re.MULTILINE)
    assert questions == shared == alone != []

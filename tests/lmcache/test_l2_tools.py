"""LMCache's own tools accept the L2 adapter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from .test_l2_manager import adapter_json, environment

LMCACHE = Path(sys.executable).with_name("lmcache")
EXAMPLE = Path(__file__).parents[2] / "examples" / "lmcache" / "l2-adapter.json"


def run(*command):
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=120, check=False
    )


def test_bench_l2_verifies_the_example(tmp_path):
    example = json.loads(EXAMPLE.read_text())
    assert example.keys() == json.loads(adapter_json()).keys()
    example["adapter_params"]["tiers"] = [f"disk://{tmp_path}?capacity=1GiB"]
    adapter = json.dumps(example)
    size = ("--num-keys", "8", "--data-size-kb", "256", "--in-flight", "3", "--rounds", "2")
    result = run(
        LMCACHE,
        "bench",
        "l2",
        "--l2-adapter",
        adapter,
        *size,
        "--no-skip-verify",
        "--lookup-max-hit-rate",
        "1",
    )
    assert result.returncode == 0, result.stderr
    assert "[Verify] All 24 keys data verified OK." in result.stdout
    for told in ("success_keys", "found", "loaded"):
        assert re.findall(rf"{told}=(\S+)", result.stdout) == ["24/24"] * 3
    assert "failed" not in result.stdout + result.stderr


def test_basic_check_passes(tmp_path):
    adapter = adapter_json(tiers=["cpu://?capacity=64MiB", f"disk://{tmp_path}"])
    check = ("-m", "lmcache.v1.basic_check", "--mode", "test_l2_adapter")
    result = run(sys.executable, *check, "--l2-adapter", adapter, "--model", "org/model", "--num-keys", "5")
    assert result.returncode == 0, result.stderr
    for told in ("5/5 correctly absent", "Batch store OK", "5/5 found", "(loaded): 5/5", "(content): 5/5"):
        assert told in result.stdout
    assert "Fail" not in result.stdout

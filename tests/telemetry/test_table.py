"""The table: what its rows are called, and that the page is made of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from droidspeak.telemetry.table import METRICS, PARTS, metrics_table

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.mark.parametrize("row", METRICS, ids=lambda row: row.name)
def test_names_are_as_prometheus_wants_them(row):
    assert re.fullmatch("[a-z][a-z0-9_]*", row.name)
    assert row.unit in ("", "bytes", "seconds", "ratio", "nats")
    if row.unit:
        assert row.name.endswith(f"_{row.unit}") or row.unit in row.name.split("_")
    assert not row.name.endswith(("_total", "_sum", "_count", "_bucket", "_created"))
    assert "le" not in row.labels
    assert row.kind != "histogram" or row.unit
    assert row.help.endswith((".", ")."))


def test_names_are_different():
    names = [name for row in METRICS for name in row.series]
    assert len(set(names)) == len(names)
    assert {row.part for row in METRICS} == set(PARTS)


def test_the_page_is_made_of_the_table():
    assert metrics_table() in PAGE.read_text()
    printed = subprocess.run(
        [sys.executable, "-m", "droidspeak.telemetry"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == metrics_table()

"""Our plug-ins in the real LMCache engine on CPU; the cases are in `engine_cases`."""

from __future__ import annotations

from .processes import check, report_of


def test_store_and_retrieve(tmp_path):
    check(report_of("engine_cases.py", "store", tmp_path))


def test_what_a_killed_process_has_left(tmp_path):
    check(report_of("engine_cases.py", "seed", tmp_path))
    check(report_of("engine_cases.py", "restart", tmp_path))

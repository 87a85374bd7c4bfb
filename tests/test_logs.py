"""Logs: warnings at a bounded rate, and lines that programs can read."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest

from droidspeak.connector import Connector, Outcome, Reason
from droidspeak.errors import UsageError
from droidspeak.logs import RateLimit, limited
from droidspeak.storage.memory import MemoryTier
from droidspeak.telemetry.logs import JsonFormatter, start_logging


@pytest.fixture
def log():
    """A logger that nobody else has, and the lines that it let through."""
    logger = logging.Logger("test")
    stream = io.StringIO()
    logger.addHandler(logging.StreamHandler(stream))
    return logger, lambda: stream.getvalue().splitlines()


def test_the_same_warning_passes_once_a_period_and_counts_the_rest(log):
    logger, lines = log
    now = [0.0]
    logger.addFilter(RateLimit(10.0, lambda: now[0]))
    for second in range(25):
        now[0] = float(second)
        logger.warning("tier %s fails", f"disk {second}")
    assert lines() == [
        "tier disk 0 fails",
        "tier disk 10 fails (and 9 more in the 10 s before)",
        "tier disk 20 fails (and 9 more in the 10 s before)",
    ]


def test_other_warnings_and_other_levels_pass(log):
    logger, lines = log
    limited(logger)
    for _time in range(3):
        logger.warning("one")
        logger.warning("another")
        logger.info("told")
        logger.error("wrong")
    assert sorted(lines()) == ["another", "one", *["told"] * 3, *["wrong"] * 3]


def test_tracebacks_are_never_left_out(log):
    logger, lines = log
    limited(logger)
    for _time in range(2):
        try:
            raise RuntimeError("a bug")
        except RuntimeError:
            logger.warning("failed", exc_info=True)
    assert lines().count("RuntimeError: a bug") == 2


def test_a_percent_sign_in_what_was_said(log):
    logger, lines = log
    now = [0.0]
    logger.addFilter(RateLimit(1.0, lambda: now[0]))
    for at in (0.0, 0.5, 2.0):
        now[0] = at
        logger.warning("%s", "100 % full")
    assert lines()[-1] == "100 % full (and 1 more in the 2 s before)"


def test_a_request_is_one_json_object_with_its_parts():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("droidspeak.connector")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        with MemoryTier(1 << 20) as tier:
            Connector(tier).record(Outcome(Reason.MISS, 300, bytes_loaded=7, wait_seconds=0.25))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line["level"] == "debug"
    assert line["time"].endswith("+00:00")
    assert line["logger"] == "droidspeak.connector.connector"
    parts = ("status", "reason", "source", "plan", "tokens", "bytes", "wait")
    assert [line[part] for part in parts] == ["fallback_reprefill", "miss", None, None, 300, 7, 0.25]


def test_a_traceback_is_a_key_of_the_object():
    try:
        raise RuntimeError("a bug")
    except RuntimeError:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "failed %d", (1,), sys.exc_info())
    line = json.loads(JsonFormatter().format(record))
    assert line["message"] == "failed 1"
    assert "RuntimeError: a bug" in line["traceback"]
    assert "\n" not in JsonFormatter().format(record)


@pytest.mark.parametrize(("level", "format"), [("loud", "text"), ("info", "xml")])
def test_what_is_not_allowed(level, format):
    with pytest.raises(UsageError, match=r"allowed: (debug|text)"):
        start_logging(level, format)


def test_started_logging_writes_json_to_standard_error():
    code = (
        "import logging; from droidspeak.telemetry.logs import start_logging; start_logging('debug', 'json');"
        "logging.getLogger('droidspeak.x').debug('hello', extra={'tokens': 3})"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == ""
    line = json.loads(told.stderr)
    assert (line["message"], line["tokens"], line["level"]) == ("hello", 3, "debug")

"""Logs for people and for programs.

    logging.getLogger("droidspeak")         everything that DroidSpeak logs, as any library does
    handler.setFormatter(JsonFormatter())   one JSON object a line; parts of a request are its keys
    start_logging("debug", "json")          for a process that has nothing else to set up

At debug there is one line a request. Warnings that come with requests are at a bounded rate
(`droidspeak.logs`), whatever the formatter.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from enum import StrEnum

from droidspeak.errors import UsageError

__all__ = ["JsonFormatter", "LogFormat", "start_logging"]

LEVELS = ("debug", "info", "warning", "error")
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class LogFormat(StrEnum):
    """How lines are written."""

    TEXT = "text"
    JSON = "json"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (ISO 8601, UTC), `level`, `logger`, `message`, and what a record carries
    besides: of a request `status`, `reason`, `source`, `receiver`, `plan`, `tokens`, `exact_tokens`,
    `shared_tokens`, `bytes`, `wait` (seconds)."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _OWN},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging(level: str, format: LogFormat | str = LogFormat.TEXT) -> None:
    """Sends what is logged from `level` on to standard error, unless the process has set up something else.

    Raises:
        UsageError: another level or format than there are.
    """
    if level not in LEVELS:
        raise UsageError(f"log level {level!r}; allowed: {', '.join(LEVELS)}")
    if format not in list(LogFormat):
        raise UsageError(f"log format {format!r}; allowed: {', '.join(LogFormat)}")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == LogFormat.JSON else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])

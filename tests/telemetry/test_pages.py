"""docs/observability.md and docs/doctor.md: what they show is what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import promql_parser
import pytest

from droidspeak.telemetry.table import METRICS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "observability.md").read_text()
SERIES = {name for row in METRICS for name in row.series}
QUESTIONS = [code for code in re.findall(r"\| `([^`\n]+)`", PAGE) if "droidspeak_" in code and " " in code]


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_to_prometheus(question):
    promql_parser.parse(question)
    assert set(re.findall(r"droidspeak_\w+", question)) <= SERIES


def test_there_are_questions():
    assert len(QUESTIONS) > 6
    named = set(re.findall(r"droidspeak_[a-z_]+(?:_total|_bytes|_seconds)\b", PAGE))
    assert {name for name in named if name not in SERIES and not name.endswith("_seconds")} == set()


def test_links_lead_somewhere():
    for page in (PAGE, (DOCS / "doctor.md").read_text(), (DOCS / "metrics.md").read_text()):
        for place in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (DOCS / place).exists(), place


def test_the_request_line_has_the_keys_that_are_logged():
    from droidspeak.connector import Outcome, Reason
    from droidspeak.connector.tally import log_request

    class Log:
        def isEnabledFor(self, _level: int) -> bool:
            return True

        def debug(self, _message: str, _told: str, extra: dict[str, object]) -> None:
            self.parts = extra

    log = Log()
    log_request(log, Outcome(Reason.MISS, 1), None)  # type: ignore[arg-type]
    (example,) = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
    assert set(example) - {"time", "level", "logger", "message"} == set(log.parts)


def test_the_doctors_document():
    from droidspeak.integrations.cli.checks import Verdict

    page = (DOCS / "doctor.md").read_text()
    (example,) = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    assert set(example) == {"version", "ok", "checks", "settings"}
    assert set(example["checks"][0]) == {"name", "verdict", "found", "advice"}
    assert set(example["settings"][0]) == {"key", "value", "source"}
    assert "`ok`, `warn` or `fail`" in page
    assert [verdict.value for verdict in Verdict] == ["ok", "warn", "fail"]

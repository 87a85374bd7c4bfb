"""The Grafana dashboard: what its panels ask for is there, by the table of metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from droidspeak.telemetry.table import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"
GRAFANA = DEPLOY / "grafana"
DASHBOARD = json.loads((GRAFANA / "droidspeak.json").read_text())
SERIES = {name: set(labels) for row in METRICS for name, labels in row.series.items()}
# Prometheus's own, and those that vLLM adds.
OUTER = {"instance", "job", "model_name", "engine"}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]


def parsed(expression: str) -> Any:
    return promql_parser.parse(expression.replace("$__rate_interval", "5m").replace("$instance", ".*"))


def nodes(node: Any) -> Iterator[Any]:
    """`node` and all that is in it."""
    yield node
    for part in ("expr", "lhs", "rhs", "param", "vector_selector"):
        if (inner := getattr(node, part, None)) is not None and not isinstance(inner, str):
            yield from nodes(inner)
    for argument in getattr(node, "args", None) or ():
        yield from nodes(argument)


def selectors(expression: str) -> list[Any]:
    return [node for node in nodes(parsed(expression)) if isinstance(node, promql_parser.VectorSelector)]


@pytest.mark.parametrize(("title", "expression", "legend"), list(expressions()))
def test_every_metric_and_label_is_in_the_table(title, expression, legend):
    found = selectors(expression)
    assert found
    known = set(OUTER)
    for selector in found:
        assert selector.name in SERIES, title
        known |= SERIES[selector.name]
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= SERIES[selector.name] | OUTER, title
    grouped = set()
    for node in nodes(parsed(expression)):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped |= set(node.modifier.labels)
    assert grouped <= known, title
    shown = {part.partition("}}")[0].strip() for part in legend.split("{{")[1:]}
    assert shown <= grouped, f"{title}: the legend names what the sum has lost"


@pytest.mark.parametrize(("title", "expression", "_legend"), list(expressions()))
def test_counters_are_read_as_rates_and_gauges_as_they_are(title, expression, _legend):
    counters = {name for row in METRICS if row.kind != "gauge" for name in row.series}
    rated = set()
    for node in nodes(parsed(expression)):
        if isinstance(node, promql_parser.Call) and node.func.name in ("rate", "increase"):
            rated |= {inner.name for inner in nodes(node) if isinstance(inner, promql_parser.VectorSelector)}
    named = {selector.name for selector in selectors(expression)}
    assert named & counters == rated, title


def test_the_metrics_that_no_panel_shows():
    shown = {selector.name for _, expression, _ in expressions() for selector in selectors(expression)}
    hidden = {row.name for row in METRICS if not shown & row.series.keys()}
    assert hidden == {
        "build_info",
        "drift_samples",
        "lookup_failures",
        "save_queue_capacity_bytes",
        "server_closed",
        "stored_bytes_loaded",
        "tier_chunks",
        "tier_evicted_chunks",
        "write_queue_capacity_bytes",
    }


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_says_what_it_shows(panel):
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_variables():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    assert "droidspeak_(build_info|lookups_total)" in variables["instance"]["definition"]
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["uid"] == "droidspeak"


def test_compose_provisions_it():
    text = (DEPLOY / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    for place in mounts:
        assert (DEPLOY / place).exists()
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/droidspeak.yaml").read_text())[
        "providers"
    ]
    folder = provider["options"]["path"]
    dashboards = [place for place in mounts.values() if place.startswith(folder)]
    assert dashboards == [services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]]
    assert all(port.startswith("127.0.0.1:") for port in services["grafana"]["ports"])

"""The metrics: one table. Registries, docs/metrics.md, the dashboard's test and the others are made from it.

Names begin with `droidspeak_`, units are seconds and bytes, what happens is counted (rates are the reader's
to take). Labels are bounded: tenants, tiers, closed lists, and models only as 12 hex digits of a source id
that has a policy or is served here; all others are `other`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["METRICS", "PARTS", "MetricRow", "Part", "metrics_table", "rows_of"]

Part = Literal["process", "server", "store", "requests", "drift"]

PARTS: dict[Part, str] = {
    "process": "Every process",
    "server": "The daemon",
    "store": "Tiers: daemon, vLLM, and processes that serve a model. `tenant` is empty for the default one",
    "requests": "Requests of a model: processes that serve one, and vLLM",
    "drift": "Drift, where requests are sampled",
}
"""Titles of the table's parts."""


@dataclass(frozen=True)
class MetricRow:
    """One metric.

    Attributes:
        name: without the prefix, and of a counter without `_total`.
        unit: of the value; empty for a plain number.
    """

    part: Part
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    labels: tuple[str, ...]
    help: str

    @property
    def family(self) -> str:
        """As Prometheus calls it."""
        return f"droidspeak_{self.name}"

    @property
    def full_name(self) -> str:
        """As it is scraped; a histogram has `_bucket`, `_sum` and `_count` of it."""
        return self.family + ("_total" if self.kind == "counter" else "")

    @property
    def series(self) -> dict[str, tuple[str, ...]]:
        """Names that can be asked for, with their labels."""
        if self.kind != "histogram":
            return {self.full_name: self.labels}
        parts = {"_bucket": (*self.labels, "le"), "_sum": self.labels, "_count": self.labels}
        return {self.family + suffix: labels for suffix, labels in parts.items()}


_PAIR = ("source", "receiver")
_TIER = ("tenant", "tier")

METRICS = (
    MetricRow("process", "build_info", "gauge", "", ("version",), "Always 1."),
    # The daemon
    MetricRow(
        "server", "server_ready", "gauge", "", (), "1 while requests are served, 0 while it starts or drains."
    ),
    MetricRow(
        "server",
        "server_requests",
        "counter",
        "",
        ("side", "command", "status"),
        "Requests: lm by command (no status), http by operation and status code.",
    ),
    MetricRow(
        "server",
        "server_refused",
        "counter",
        "",
        ("side", "reason"),
        "Requests not answered with what they asked for.",
    ),
    MetricRow(
        "server", "server_failed", "counter", "", ("command",), "lm requests that the store failed to serve."
    ),
    MetricRow("server", "server_connections", "gauge", "", ("side",), "Open connections."),
    MetricRow(
        "server",
        "server_closed",
        "counter",
        "",
        ("side", "reason"),
        "Connections that ended, by who or what.",
    ),
    MetricRow(
        "server", "server_received_bytes", "counter", "bytes", ("side",), "Bytes of payloads received."
    ),
    MetricRow("server", "server_sent_bytes", "counter", "bytes", ("side",), "Bytes of answers sent."),
    MetricRow(
        "server",
        "server_in_flight_bytes",
        "gauge",
        "bytes",
        (),
        "Payloads being received or sent, both sides.",
    ),
    MetricRow("server", "server_in_flight_capacity_bytes", "gauge", "bytes", (), "The most of it."),
    # Tiers
    MetricRow("store", "tier_up", "gauge", "", _TIER, "1 if the tier answers, 0 if not."),
    MetricRow("store", "tier_bytes", "gauge", "bytes", _TIER, "Bytes held."),
    MetricRow(
        "store",
        "tier_capacity_bytes",
        "gauge",
        "bytes",
        _TIER,
        "The most of it, a tenant's quota; absent without a bound.",
    ),
    MetricRow("store", "tier_chunks", "gauge", "", _TIER, "Chunks held."),
    MetricRow(
        "store",
        "tier_skipped",
        "gauge",
        "",
        (*_TIER, "side"),
        "1 while a failing tier is not asked (side: reading, writing).",
    ),
    MetricRow(
        "store",
        "tier_evicted_chunks",
        "counter",
        "",
        _TIER,
        "Chunks that this process threw out to make room.",
    ),
    MetricRow("store", "tier_evicted_bytes", "counter", "bytes", _TIER, "Bytes of them."),
    MetricRow(
        "store", "write_queue_bytes", "gauge", "bytes", _TIER, "Bytes that wait to be written to the tier."
    ),
    MetricRow("store", "write_queue_capacity_bytes", "gauge", "bytes", _TIER, "The most of it."),
    MetricRow(
        "store", "promote_queue_bytes", "gauge", "bytes", ("tenant",), "Bytes that wait for a faster tier."
    ),
    MetricRow(
        "store",
        "store_events",
        "counter",
        "",
        (*_TIER, "event"),
        "Hits, misses, corruptions (`corrupt`) and so on; tier is empty for what is of no tier.",
    ),
    # Requests of a model
    MetricRow(
        "requests",
        "lookups",
        "counter",
        "",
        ("result",),
        "Lookups by what they found (a reason); an engine may look up a request more than once.",
    ),
    MetricRow("requests", "lookup_seconds", "histogram", "seconds", (), "Time that a lookup took."),
    MetricRow(
        "requests", "lookup_failures", "counter", "", (), "Questions to the store that no tier answered."
    ),
    MetricRow(
        "requests",
        "requests",
        "counter",
        "",
        ("status", "reason"),
        "Requests by what became of them (docs/statuses.md).",
    ),
    MetricRow(
        "requests",
        "hit_tokens",
        "counter",
        "",
        _PAIR,
        "Tokens that were not prefilled, by the model whose cache served and the one that was asked.",
    ),
    MetricRow(
        "requests",
        "plan_layers",
        "counter",
        "",
        ("action",),
        "Layers of the plans that served cross-model hits: reuse, map, recompute.",
    ),
    MetricRow(
        "requests",
        "load_bytes",
        "counter",
        "bytes",
        ("tier",),
        "Decoded bytes that loads got from the tier.",
    ),
    MetricRow(
        "requests",
        "load_seconds",
        "counter",
        "seconds",
        ("tier",),
        "Time in which at least one loader read them; bytes by seconds is the tier's bandwidth.",
    ),
    MetricRow(
        "requests", "stored_bytes_loaded", "counter", "bytes", (), "Stored bytes that requests loaded."
    ),
    MetricRow(
        "requests",
        "load_wait_seconds",
        "counter",
        "seconds",
        (),
        "Time for which the engine stood still, waiting for layers.",
    ),
    MetricRow(
        "requests",
        "ttft_predicted_seconds",
        "histogram",
        "seconds",
        (),
        "Time to first token that the policy's costs predict for a cross-model hit, at its lookup.",
    ),
    MetricRow(
        "requests",
        "ttft_seconds",
        "histogram",
        "seconds",
        ("hit",),
        "Time to first token as the door measured it (hit: own, other, none); vLLM has its own metric.",
    ),
    MetricRow(
        "requests",
        "save_chunks",
        "counter",
        "",
        ("result",),
        "Chunks to be saved: saved, failed (the store refused), dropped (no room), abandoned (not whole).",
    ),
    MetricRow("requests", "save_queue_bytes", "gauge", "bytes", (), "Bytes that wait to be saved."),
    MetricRow("requests", "save_queue_capacity_bytes", "gauge", "bytes", (), "The most of it."),
    # Drift
    MetricRow("drift", "drift_out_of_service", "gauge", "", _PAIR, "1 while the pair has drifted."),
    MetricRow(
        "drift", "drift_samples", "counter", "", _PAIR, "Requests that were checked under the pair's policy."
    ),
    MetricRow(
        "drift",
        "drift_agreement_ratio",
        "gauge",
        "ratio",
        _PAIR,
        "Share of tokens that agree with the receiver's own prefill, over the latest samples.",
    ),
    MetricRow(
        "drift", "drift_kl_nats", "gauge", "nats", _PAIR, "Divergence of the logits, over the latest samples."
    ),
)


def rows_of(*parts: Part) -> list[MetricRow]:
    """The rows of some parts of the table."""
    return [row for row in METRICS if row.part in parts]


def metrics_table() -> str:
    """The table as Markdown, part by part."""
    return "\n\n".join(f"### {title}\n\n{_table(rows_of(part))}" for part, title in PARTS.items())


def _table(rows: Iterable[MetricRow]) -> str:
    lines = ["| metric | type | unit | labels | meaning |", "|---|---|---|---|---|"]
    for row in rows:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        lines.append(f"| `{row.full_name}` | {row.kind} | {row.unit} | {labels} | {row.help} |")
    return "\n".join(lines)

"""What a process tells of itself: metrics (`export`), logs (`logs`); the traces are in `droidspeak.tracing`.

The metrics' table is `droidspeak.telemetry.table.METRICS`; docs/observability.md begins at the beginning.
"""

from droidspeak.telemetry.table import METRICS, MetricRow, metrics_table

__all__ = ["METRICS", "MetricRow", "metrics_table"]

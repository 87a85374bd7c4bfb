"""`python -m droidspeak.telemetry` prints the metrics table as docs/metrics.md has it."""

from droidspeak.telemetry.table import metrics_table

print(metrics_table())

"""Metrics of a run, and redaction of secrets. It collects nothing itself. Start at `metrics`."""

from miles.telemetry.metrics import MetricsWriter, read_metrics

__all__ = ["MetricsWriter", "read_metrics"]

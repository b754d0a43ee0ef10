"""Where the numbers of a run go."""

from miles.telemetry.metrics import MetricsWriter, read_metrics

__all__ = ["MetricsWriter", "read_metrics"]

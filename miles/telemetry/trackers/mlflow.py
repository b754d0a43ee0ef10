"""MLflow."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from miles.config.sections.telemetry import TelemetryConfig

JOB_TAG = "miles.job_id"
_MAX_PARAM = 6000
"""Characters of a setting's value that MLflow takes."""
_BATCH = 1000
"""Metrics in one call that MLflow takes; of params it takes 100."""


class MlflowTracker:
    """Logs to one MLflow run, found again by the job's id, so that a resumed job continues its run."""

    def __init__(
        self, telemetry: TelemetryConfig, name: str, job_id: str, run_dir: pathlib.Path, config: Mapping[str, Any]
    ) -> None:
        """`name` is the run's here, `config` its settings without secrets."""
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=telemetry.mlflow_tracking_uri or local_store(run_dir))
        self._run_id = telemetry.mlflow_run_id or self._find_run(telemetry, name, job_id, config)
        self._client.update_run(self._run_id, status="RUNNING")

    def write(self, step: int, unix_s: float, values: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(unix_s * 1000), step) for name, value in values.items()]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + _BATCH])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)

    def _find_run(self, telemetry: TelemetryConfig, name: str, job_id: str, config: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(telemetry.mlflow_experiment_name)
        if experiment is None:
            experiment_id = self._client.create_experiment(telemetry.mlflow_experiment_name)
        else:
            experiment_id = experiment.experiment_id
        for run in self._client.search_runs([experiment_id], f"tags.`{JOB_TAG}` = '{job_id}'", max_results=1):
            return str(run.info.run_id)
        run = self._client.create_run(experiment_id, run_name=telemetry.mlflow_run_name or name, tags={JOB_TAG: job_id})
        run_id = str(run.info.run_id)
        for key, value in config.items():
            if value is not None:
                self._client.log_param(run_id, key, str(value)[:_MAX_PARAM])
        return run_id


def local_store(run_dir: pathlib.Path) -> str:
    """Return the URI of a store in the run's folder, which is created."""
    folder = run_dir / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(folder / 'mlflow.db').absolute()}"

"""Weights & Biases."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from miles.config.sections.telemetry import TelemetryConfig

STEP = "step"
"""The metric that is every chart's axis. W&B's own step only rises, and a resumed run takes steps again."""


class WandbTracker:
    """Logs to one W&B run, whose id is the job's, so that a resumed job continues its run."""

    def __init__(
        self, telemetry: TelemetryConfig, name: str, job_id: str, run_dir: pathlib.Path, config: Mapping[str, Any]
    ) -> None:
        """`name` is the run's here, `config` its settings without secrets."""
        import wandb

        suffix = f"_{job_id[:8]}" if telemetry.wandb_random_suffix else ""
        group = telemetry.wandb_group and telemetry.wandb_group + suffix
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_job_creation=True)
        if telemetry.wandb_key is not None:
            settings.api_key = telemetry.wandb_key
        if telemetry.wandb_host is not None:
            settings.base_url = telemetry.wandb_host
        self._run = wandb.init(
            project=telemetry.wandb_project,
            entity=telemetry.wandb_team,
            group=group,
            name=telemetry.wandb_run_name or group or name + suffix,
            id=telemetry.wandb_run_id or job_id,
            resume="allow",
            mode=telemetry.wandb_mode,
            dir=telemetry.wandb_dir or str(run_dir),
            config=dict(config),
            settings=settings,
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, step: int, unix_s: float, values: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        self._run.log({STEP: step, **values})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()

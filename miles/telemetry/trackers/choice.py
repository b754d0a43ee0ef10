"""Opens the trackers that a configuration asks for."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from miles.telemetry.redaction import redact_config
from miles.telemetry.trackers.background import BackgroundTracker
from miles.telemetry.trackers.base import Tracker
from miles.telemetry.trackers.mlflow import MlflowTracker
from miles.telemetry.trackers.tensorboard import TensorBoardTracker
from miles.telemetry.trackers.wandb import WandbTracker

if TYPE_CHECKING:
    from miles.config import JobConfig


def open_trackers(
    config: JobConfig, job_id: str, run_dir: pathlib.Path, warn: Callable[[str], None]
) -> list[BackgroundTracker]:
    """Return the trackers of a job, which open in the background; `warn` is called in their threads."""
    telemetry, name = config.telemetry, config.services.name
    tensorboard = pathlib.Path(telemetry.tb_project_name or run_dir / "tensorboard")
    settings = redact_config(config.to_flat())
    asked: list[tuple[bool, str, Callable[[], Tracker]]] = [
        (
            telemetry.use_tensorboard,
            "TensorBoard",
            functools.partial(TensorBoardTracker, tensorboard / (telemetry.tb_experiment_name or name)),
        ),
        (
            telemetry.use_wandb,
            "Weights & Biases",
            functools.partial(WandbTracker, telemetry, name, job_id, run_dir, settings),
        ),
        (telemetry.use_mlflow, "MLflow", functools.partial(MlflowTracker, telemetry, name, job_id, run_dir, settings)),
    ]
    return [BackgroundTracker(title, opening, warn) for wanted, title, opening in asked if wanted]

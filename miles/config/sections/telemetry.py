"""Metric sinks in addition to metrics.jsonl, which is always written."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Derived, Metavar, Negated, NonNegative, Section, States


class TelemetryConfig(Section):
    """Metric sinks."""

    use_tensorboard: bool = False
    """Write metrics for TensorBoard."""

    tb_project_name: Annotated[str | None, Derived("$TENSORBOARD_DIR, else RUN_DIR/tensorboard"), Metavar("DIR")] = None
    """Folder for TensorBoard files."""

    tb_experiment_name: Annotated[str | None, Derived("name")] = None
    """Name of the run in TensorBoard."""

    use_wandb: bool = False
    """Send metrics to Weights & Biases (package wandb). A resumed job continues its run there."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """offline writes to wandb_dir, to be sent by `wandb sync` later; not given means $WANDB_MODE, else online."""

    wandb_dir: Annotated[str | None, Derived("RUN_DIR"), Metavar("DIR")] = None
    """Folder in which the folder wandb is made."""

    wandb_key: str | None = None
    """API key; $WANDB_API_KEY or `wandb login` keep it out of commands and records."""

    wandb_host: Annotated[str | None, Metavar("URL")] = None
    """Server to use instead of the public one."""

    wandb_team: str | None = None
    """Team or user that owns the project; not given means the default of the account."""

    wandb_project: str | None = None
    """Project of the run; not given means W&B's own default."""

    wandb_group: str | None = None
    """Group of the run."""

    wandb_run_name: Annotated[str | None, Derived("wandb_group, else name")] = None
    """Name of the run in W&B."""

    wandb_run_id: Annotated[str | None, Derived("the job's id")] = None
    """Run of W&B to continue."""

    wandb_random_suffix: Annotated[bool, Negated("--disable-wandb-random-suffix")] = True
    """Add the beginning of the job's id to the names of group and run."""

    wandb_always_use_train_step: Annotated[
        bool | None, States(True, "the axis of every metric is the training step")
    ] = None
    """Use the training step as the axis of every metric."""

    use_mlflow: bool = False
    """Send metrics to MLflow (package mlflow or mlflow-skinny). A resumed job continues its run there."""

    mlflow_tracking_uri: Annotated[
        str | None, Derived("$MLFLOW_TRACKING_URI, else a database in RUN_DIR/mlflow"), Metavar("URI")
    ] = None
    """Tracking server (https://…), or a local store (sqlite:///FILE)."""

    mlflow_experiment_name: str = "miles"
    """Experiment, which is created if there is none."""

    mlflow_run_name: Annotated[str | None, Derived("name")] = None
    """Name of the run in MLflow."""

    mlflow_run_id: Annotated[str | None, Derived("found by the job's id, or created")] = None
    """Run of MLflow to continue."""

    log_samples_per_step: NonNegative = 4
    """Number of prompts per step whose samples are recorded for inspection; 0 records none."""

    log_whole_samples: bool = False
    """Record those samples whole too, with prompt tokens and routed experts, for `miles samples check`."""

    log_passrate: bool = False
    """Report pass@k of the rollouts' prompts (passrate/pass@k): the chance that one of k responses has reward 1. Those
    of evaluations are always reported."""

    trace_steps: Annotated[tuple[NonNegative, ...], Metavar("STEP ...")] = ()
    """Steps of which a trace is written to RUN_DIR/traces: what each process did when. See `miles trace RUN_DIR`."""

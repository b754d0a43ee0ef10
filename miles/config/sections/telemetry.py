"""Metric sinks in addition to metrics.jsonl, which is always written."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Derived, Metavar, NonNegative, Section


class TelemetryConfig(Section):
    """Metric sinks."""

    use_tensorboard: bool = False
    """Write metrics for TensorBoard."""

    tb_project_name: Annotated[str | None, Derived("$TENSORBOARD_DIR, else RUN_DIR/tensorboard"), Metavar("DIR")] = None
    """Folder for TensorBoard files."""

    tb_experiment_name: Annotated[str | None, Derived("name")] = None
    """Name of the run in TensorBoard."""

    log_samples_per_step: NonNegative = 4
    """Number of prompts per step whose samples are recorded for inspection; 0 records none."""

    log_whole_samples: bool = False
    """Record those samples whole too, with prompt tokens and routed experts, for `miles samples check`."""

    log_passrate: bool = False
    """Report pass@k of the rollouts' prompts (passrate/pass@k): the chance that one of k responses has reward 1. Those
    of evaluations are always reported."""

    trace_steps: Annotated[tuple[NonNegative, ...], Metavar("STEP ...")] = ()
    """Steps of which a trace is written to RUN_DIR/traces: what each process did when. See `miles trace RUN_DIR`."""

"""Flags by which the test suites of slime and miles watch a run from inside."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Ignored, Metavar, Section

_NOTHING = "a run has no checks of a test suite in it; compare its metrics instead"


class CiConfig(Section):
    """Checks that test suites of other systems turn on in a run. None is made here: tests look at metrics, logs and
    checkpoints."""

    ci_test: Annotated[bool | None, Ignored(_NOTHING)] = None
    """Make the checks of the test suite."""

    ci_disable_kl_checker: Annotated[bool | None, Ignored(_NOTHING)] = None
    """Leave out the check that the KL divergence begins at 0."""

    ci_disable_logprobs_checker: Annotated[bool | None, Ignored(_NOTHING)] = None
    """Leave out the check that the log-probabilities of trainer and engine are close."""

    ci_disable_weight_update_checker: Annotated[bool | None, Ignored(_NOTHING)] = None
    """Leave out the check that engines hold the trainer's weights."""

    ci_save_grad_norm: Annotated[
        str | None, Metavar("FILE"), Ignored("train/grad_norm is in every run's metrics.jsonl; no file is written")
    ] = None
    """Write the norm of each gradient to files."""

    ci_load_grad_norm: Annotated[
        str | None, Metavar("FILE"), Ignored("train/grad_norm is compared with no file; it is in metrics.jsonl")
    ] = None
    """Compare the norm of each gradient with those of such files."""

    ci_metric_checker_key: Annotated[str | None, Ignored("no metric makes a run fail; it is in metrics.jsonl")] = None
    """Metric of an evaluation that has to reach ci_metric_checker_threshold."""

    ci_metric_checker_threshold: Annotated[float | None, Ignored("no metric makes a run fail")] = None
    """What that metric has to reach."""

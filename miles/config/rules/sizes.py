"""Rules about sizes that no machine could hold, with which a job would take the controller down for all."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

_GROUP_SAMPLES = 1 << 16
_STEP_SAMPLES = 1 << 24
_STEPS = 1 << 53


@rule
def a_group_can_be_held(s: FlatSettings) -> Iterator[Fault]:
    for key in ("n_samples_per_prompt", "n_samples_per_eval_prompt"):
        count = getattr(s, key)
        if count is not None and count > _GROUP_SAMPLES:
            yield Fault(key, count, f"a group holds at most {_GROUP_SAMPLES} samples", "lower it")


@rule
def a_step_can_be_held(s: FlatSettings) -> Iterator[Fault]:
    if s.n_samples_per_prompt > _GROUP_SAMPLES:
        return
    groups = max(s.rollout_batch_size or 0, s.over_sampling_batch_size or 0)
    if groups * s.n_samples_per_prompt > _STEP_SAMPLES:
        problem = f"× n_samples_per_prompt = {s.n_samples_per_prompt} samples, and a step holds at most {_STEP_SAMPLES}"
        yield Fault("rollout_batch_size", groups, f"that is {problem}", "lower one of them")


@rule
def the_number_of_steps_is_a_number_of_steps(s: FlatSettings) -> Iterator[Fault]:
    for key in ("num_rollout", "num_epoch"):
        count = getattr(s, key)
        if count is not None and count > _STEPS:
            yield Fault(key, count, "no run takes so many steps", f"give at most {_STEPS}")

"""Rules about how far generation may run ahead of training."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings


@rule
def a_batch_can_fill(s: FlatSettings) -> Iterator[Fault]:
    begun, prompts = s.over_sampling_batch_size, s.rollout_batch_size
    if begun is not None and begun < prompts:
        problem = f"a batch of rollout_batch_size = {prompts} would never be complete"
        yield Fault("over_sampling_batch_size", begun, problem, f"set it to {prompts} or more")


@rule
def surplus_is_trained_on_in_time(s: FlatSettings) -> Iterator[Fault]:
    begun, room = s.over_sampling_batch_size, s.rollout_batch_size * (s.max_weight_staleness + 1)
    if begun is not None and begun > room:
        problem = (
            f"what is begun beyond a batch is trained on later, and max_weight_staleness = {s.max_weight_staleness} "
            f"leaves room for rollout_batch_size × (max_weight_staleness + 1) = {room}"
        )
        enough = -(-begun // s.rollout_batch_size) - 1
        yield Fault("over_sampling_batch_size", begun, problem, f"lower it, or set max_weight_staleness to {enough}")


@rule
def weights_are_published_in_time(s: FlatSettings) -> Iterator[Fault]:
    interval, bound = s.update_weights_interval, s.max_weight_staleness
    if interval > bound + 1:
        problem = f"the engines' weights get {interval - 1} steps old and max_weight_staleness = {bound} forbids it"
        yield Fault("update_weights_interval", interval, problem, f"set max_weight_staleness to {interval - 1} or more")


@rule
def interrupted_responses_may_be_stale(s: FlatSettings) -> Iterator[Fault]:
    for key in ("partial_rollout", "mask_offpolicy_in_partial_rollout"):
        if getattr(s, key) and s.max_weight_staleness == 0:
            problem = "with max_weight_staleness = 0 every response is of one version"
            yield Fault(key, True, problem, "set max_weight_staleness to 1 or more, or leave it out")

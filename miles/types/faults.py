"""Everything that does not fit together in one sample: tokens, log-probabilities, loss mask, versions, routed experts.

`check_sample` stops at the first violation of the wire format; this finds all of them, and what no single field shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.types.errors import MalformedMessage
from miles.types.experts import ExpertLayout
from miles.types.sample import Sample, SampleStatus
from miles.types.validate import FORM_CHECKS, VALUE_CHECKS

ROUNDING = 1e-5
"""How far above 0 rounding may bring a log-probability, in nats."""


@dataclasses.dataclass(frozen=True, slots=True)
class SampleFault:
    """One thing that is wrong with a sample."""

    field: str
    problem: str
    """The value, where it is, and what is expected."""

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


def sample_faults(
    sample: Sample, layout: ExpertLayout | None = None, *, needs_routing: bool = False
) -> list[SampleFault]:
    """Everything that is wrong with a sample; an empty list when its parts fit together.

    With the `layout` of the model's experts, their layers and numbers are checked against it. With `needs_routing` a
    response without routed experts is a fault.
    """
    faults = [fault for check in FORM_CHECKS for fault in _violations(check, sample)]
    wrong = {fault.field for fault in faults}
    faults += [f for field, check in VALUE_CHECKS.items() if field not in wrong for f in _violations(check, sample)]
    wrong = {fault.field for fault in faults}
    if "tokens" not in wrong and "response_length" not in wrong:
        faults += _response_faults(sample)
        if "rollout_log_probs" not in wrong:
            faults += _log_prob_faults(sample)
        if "rollout_routed_experts" not in wrong:
            faults += _routing_faults(sample, layout, needs_routing=needs_routing)
    return faults


def _violations(check: Callable[[Sample], None], sample: Sample) -> list[SampleFault]:
    try:
        check(sample)
    except MalformedMessage as error:
        return [SampleFault(error.field, error.problem)]
    return []


def _response_faults(sample: Sample) -> Iterator[SampleFault]:
    ended = sample.status in (SampleStatus.COMPLETED, SampleStatus.TRUNCATED)
    if ended and not sample.response_length:
        yield SampleFault("status", f"{sample.status.name}, but there is no response; expected PENDING or FAILED")
    if ended and sample.prompt_length < 1:
        yield SampleFault("tokens", f"{len(sample.tokens)}, all of them the response's; a prompt has at least one")


def _log_prob_faults(sample: Sample) -> Iterator[SampleFault]:
    log_probs = sample.rollout_log_probs
    if log_probs is None:
        if sample.response_length and sample.status is not SampleStatus.FAILED:
            yield SampleFault("rollout_log_probs", f"none for {sample.response_length} response tokens")
        return
    if len(above := np.flatnonzero(log_probs > ROUNDING)):
        problem = f"entry {above[0]} is {log_probs[above[0]]:g}; log-probabilities are at most 0"
        yield SampleFault("rollout_log_probs", problem)


def _routing_faults(sample: Sample, layout: ExpertLayout | None, *, needs_routing: bool) -> Iterator[SampleFault]:
    field, experts = "rollout_routed_experts", sample.rollout_routed_experts
    if experts is None:
        if needs_routing and sample.response_length and sample.status is not SampleStatus.FAILED:
            yield SampleFault(field, f"none for {len(sample.tokens)} tokens; the engine was to record them")
        return
    if layout is not None:
        shape = (len(layout.moe_layers), layout.top_k)
        if experts.shape[1:] != shape:
            problem = f"{experts.shape[1]} layers and {experts.shape[2]} experts a token"
            yield SampleFault(field, f"{problem}; the model has {shape[0]} layers with experts and chooses {shape[1]}")
        if len(outside := np.argwhere(experts >= layout.experts)):
            yield SampleFault(
                field, f"{_named(experts, outside[0])}; the model's {layout.experts} experts count from 0"
            )
    ordered = np.sort(experts, axis=2)
    if len(twice := np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])):
        row, layer, _ = twice[0]
        problem = f"token {row} goes to experts {experts[row, layer].tolist()} in layer {layer}"
        more = f", and so do {len({(r, n) for r, n, _ in twice.tolist()}) - 1} more" if len(twice) > 1 else ""
        yield SampleFault(field, f"{problem}{more}; a token's experts differ (all zeros: nothing was recorded)")


def _named(experts: npt.NDArray[np.integer[Any]], place: npt.NDArray[np.integer[Any]]) -> str:
    row, layer, choice = (int(each) for each in place)
    return f"choice {choice} of token {row} in layer {layer} is expert {experts[row, layer, choice]}"

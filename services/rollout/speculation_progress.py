"""Reports what an engine's drafts have been good for."""

from __future__ import annotations

from miles.rpc.gen import rollout_pb2
from miles.services.rollout.engines.base import SpeculationCounts, SpeculationState
from miles.services.rollout.groups.earlier_responses import EarlierResponses


def speculation_progress(state: SpeculationState, earlier: EarlierResponses | None) -> rollout_pb2.SpeculationProgress:
    """Return the state as a message, with what was found of earlier responses, if any are kept."""
    return rollout_pb2.SpeculationProgress(
        draft_version=state.draft_version,
        num_steps=state.num_steps,
        reason=state.reason,
        counts=map(_counts, state.counts),
        speedup=state.speedup,
        prompts_with_responses=0 if earlier is None else earlier.found,
        prompts_without_responses=0 if earlier is None else earlier.missed,
    )


def drafting_load(progress: rollout_pb2.RunProgress) -> dict[str, float]:
    """Return what a heartbeat says of drafts: the steps of now, and tokens per verification of the newest versions."""
    if not progress.HasField("speculation"):
        return {}
    load = {"draft_steps": float(progress.speculation.num_steps)}
    for newest in progress.speculation.counts[-1:]:
        if newest.verify_count:
            load["accept_length"] = 1 + newest.accepted_draft_tokens / newest.verify_count
    return load


def _counts(counts: SpeculationCounts) -> rollout_pb2.SpeculationCounts:
    return rollout_pb2.SpeculationCounts(
        policy_version=counts.policy_version,
        draft_version=counts.draft_version,
        verify_count=counts.verify_count,
        proposed_draft_tokens=counts.proposed_draft_tokens,
        accepted_draft_tokens=counts.accepted_draft_tokens,
    )

"""What a rollout service reports of an engine's drafts."""

from __future__ import annotations

from miles.rpc.gen import rollout_pb2
from miles.services.rollout.engines.base import SpeculationCounts, SpeculationState
from miles.services.rollout.speculation_progress import drafting_load, speculation_progress


def test_a_state_becomes_a_message_with_its_counts_in_order() -> None:
    counts = (SpeculationCounts(3, None, 10, 30, 5), SpeculationCounts(4, 0, 4, 12, 6))
    message = speculation_progress(SpeculationState(0, 2, "why", counts, 1.25), None)
    assert (message.HasField("draft_version"), message.draft_version, message.num_steps) == (True, 0, 2)
    assert (message.reason, message.speedup) == ("why", 1.25)
    first, second = message.counts
    assert not first.HasField("draft_version")
    assert (first.policy_version, first.verify_count, first.proposed_draft_tokens) == (3, 10, 30)
    assert second.HasField("draft_version")
    assert second.accepted_draft_tokens == 6
    assert not speculation_progress(SpeculationState(None, 2), None).HasField("draft_version")


def test_heartbeats_have_the_newest_versions_acceptance_and_nothing_without_drafts() -> None:
    assert drafting_load(rollout_pb2.RunProgress()) == {}
    begun = speculation_progress(SpeculationState(None, 3), None)
    assert drafting_load(rollout_pb2.RunProgress(speculation=begun)) == {"draft_steps": 3.0}
    counts = (SpeculationCounts(3, 0, 10, 30, 5), SpeculationCounts(4, 0, 4, 12, 6))
    drafting = speculation_progress(SpeculationState(0, 0, "why", counts), None)
    load = drafting_load(rollout_pb2.RunProgress(speculation=drafting))
    assert load == {"draft_steps": 0.0, "accept_length": 2.5}

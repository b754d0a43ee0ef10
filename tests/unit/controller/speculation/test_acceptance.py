"""What a run's drafts are good for, by engine and versions."""

from __future__ import annotations

import json

import pytest

from miles.config.speculation import DraftKind, Speculation
from miles.rpc.gen.rollout_pb2 import SpeculationCounts, SpeculationProgress
from miles.services.controller.speculation.acceptance import MOST_VERSIONS, RunAcceptance
from miles.services.controller.speculation.advice import DraftSetup

SETUP = DraftSetup(Speculation(DraftKind.EAGLE3, "/models/head", num_steps=3), trained=False)


def run() -> RunAcceptance:
    """A run with two engines that have reported once, as they do before their first lease."""
    made = RunAcceptance(SETUP, 1.05)
    for engine in ("rollout-0", "rollout-1"):
        made.note(engine, "first", SpeculationProgress(num_steps=3, draft_version=0))
    return made


def report(*counts: tuple[int, int, int, int, int], **state: float) -> SpeculationProgress:
    """A report of (policy, draft, verifications, proposed, accepted)."""
    made = SpeculationProgress(num_steps=3, **state)  # type: ignore[arg-type]
    for policy, draft, verified, proposed, accepted in counts:
        made.counts.append(
            SpeculationCounts(
                policy_version=policy,
                draft_version=draft,
                verify_count=verified,
                proposed_draft_tokens=proposed,
                accepted_draft_tokens=accepted,
            )
        )
    return made


def test_a_step_has_what_was_counted_in_it_for_all_engines_and_for_each() -> None:
    acceptance = run()
    acceptance.note("rollout-0", "first", report((0, 0, 5, 15, 5), draft_version=0))
    acceptance.note("rollout-0", "first", report((0, 0, 10, 30, 15), draft_version=1))
    acceptance.note("rollout-1", "first", report((0, 0, 10, 20, 5), draft_version=0, speedup=1.5))
    assert acceptance.finish_step(0).metrics == {
        "speculative/accept_length": 2.0,
        "speculative/accept_rate": 0.4,
        "speculative/accept_length/rollout-0": 2.5,
        "speculative/accept_rate/rollout-0": 0.5,
        "speculative/accept_length/rollout-1": 1.5,
        "speculative/accept_rate/rollout-1": 0.25,
        "speculative/num_steps/rollout-0": 3.0,
        "speculative/num_steps/rollout-1": 3.0,
        "speculative/draft_version": 0.0,
        "speculative/draft_version/rollout-0": 1.0,
        "speculative/draft_version/rollout-1": 0.0,
        "speculative/speedup": 1.5,
        "speculative/speedup/rollout-1": 1.5,
    }
    quiet = acceptance.finish_step(1).metrics
    assert not [name for name in quiet if "accept" in name], "nothing was verified in that step"


def test_a_step_has_the_share_of_its_prompts_with_earlier_responses() -> None:
    acceptance = run()
    for with_some, without in ((0, 4), (1, 4)):
        progress = report(prompts_with_responses=with_some, prompts_without_responses=without)
        acceptance.note("rollout-0", "first", progress)
    assert acceptance.finish_step(0).metrics["speculative/earlier_responses"] == 0.2
    acceptance.note("rollout-0", "first", report(prompts_with_responses=4, prompts_without_responses=5))
    assert acceptance.finish_step(1).metrics["speculative/earlier_responses"] == 0.75
    acceptance.note("rollout-0", "first", report(prompts_with_responses=1, prompts_without_responses=0))
    assert acceptance.finish_step(2).metrics["speculative/earlier_responses"] == 1.0, "the job started again there"
    assert "speculative/earlier_responses" not in acceptance.finish_step(3).metrics


def test_a_run_without_drafts_has_no_metrics() -> None:
    news = RunAcceptance(SETUP, 1.05).finish_step(0)
    assert (news.metrics, news.warnings, news.events) == ({}, [], [])


def test_counts_are_kept_by_versions_over_engines_and_over_the_loss_of_one() -> None:
    acceptance = run()
    acceptance.note("rollout-0", "first", report((1, 0, 5, 15, 5), (1, 1, 2, 6, 4)))
    acceptance.note("rollout-1", "first", report((1, 1, 3, 9, 6)))
    acceptance.lose("rollout-0")
    acceptance.note("rollout-0", "second", SpeculationProgress(num_steps=3))
    acceptance.note("rollout-0", "second", report((1, 1, 1, 3, 0)))
    kept = {(each["policy_version"], each["draft_version"]): each for each in acceptance.by_versions()}
    assert kept[1, 0]["verifications"] == 5
    assert kept[1, 1] == {
        "policy_version": 1,
        "draft_version": 1,
        "verifications": 6,
        "proposed": 18,
        "accepted": 10,
        "accept_length": 1 + 10 / 6,
        "accept_rate": 10 / 18,
    }
    first, second = acceptance.engines()
    assert [first.worker_id, second.worker_id] == ["rollout-0", "rollout-1"]
    assert [count.verify_count for count in first.progress.counts] == [5, 3]
    assert [count.verify_count for count in second.progress.counts] == [3]


def test_a_lost_engine_has_its_counts_alone() -> None:
    acceptance = run()
    acceptance.note("rollout-0", "first", report((1, 0, 5, 15, 5), draft_version=4, speedup=2.0))
    acceptance.lose("rollout-0")
    lost, _ = acceptance.engines()
    assert [count.accepted_draft_tokens for count in lost.progress.counts] == [5]
    assert (lost.progress.num_steps, lost.progress.speedup, lost.progress.HasField("draft_version")) == (0, 0.0, False)
    assert acceptance.finish_step(0).metrics["speculative/accept_length/rollout-0"] == 2.0


def test_the_newest_versions_are_kept() -> None:
    acceptance = run()
    for version in range(MOST_VERSIONS + 10):
        acceptance.note("rollout-0", "first", report((version, 0, 1, 3, 1)))
    kept = [each["policy_version"] for each in acceptance.by_versions()]
    assert kept == list(range(10, MOST_VERSIONS + 10))
    assert len(acceptance.engines()[0].progress.counts) == MOST_VERSIONS


def test_a_resumed_job_goes_on_counting() -> None:
    before = run()
    before.note("rollout-0", "first", report((1, 0, 5, 15, 5)))
    stored = json.loads(json.dumps(before.by_versions()))
    resumed = RunAcceptance(SETUP, 1.05, stored)
    resumed.note("rollout-0", "first", report((1, 0, 5, 15, 5)))
    resumed.note("rollout-0", "first", report((1, 0, 7, 21, 6)))
    (kept,) = resumed.by_versions()
    assert (kept["verifications"], kept["accepted"]) == (7, 6)


@pytest.mark.parametrize("length", [1.0, 2.0])
def test_alarms_and_switches_come_with_the_step(length: float) -> None:
    acceptance = run()
    progress = report((0, 0, 200, 600, round(200 * (length - 1))))
    progress.num_steps, progress.reason = 0, "0.9 times as fast with drafts"
    acceptance.note("rollout-0", "first", progress)
    news = acceptance.finish_step(3)
    assert len(news.warnings) == (length == 1.0)
    (event,) = news.events
    assert "0.9 times as fast" in event

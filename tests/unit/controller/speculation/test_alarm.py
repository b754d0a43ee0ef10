"""Alarms of drafts that are not accepted, and of drafts that the policy moves away from."""

from __future__ import annotations

import pytest

from miles.config.speculation import DraftKind, Speculation
from miles.services.controller.speculation.advice import DraftSetup
from miles.services.controller.speculation.alarm import ENOUGH_AT_OFF, GRACE, AcceptanceAlarm, StepCounts
from miles.services.controller.speculation.draft_counts import DraftCounts, Versions
from miles.services.controller.speculation.drift import ENOUGH

FROZEN = DraftSetup(Speculation(DraftKind.EAGLE3, "/models/head", num_steps=3), trained=False)
TRAINED = DraftSetup(Speculation(DraftKind.EAGLE3, None, num_steps=3), trained=True)


def alarm(setup: DraftSetup = FROZEN) -> AcceptanceAlarm:
    return AcceptanceAlarm(setup, 1.05)


def step(
    length: float, *, engine: str = "rollout-0", verifications: int = 1000, policy: int = 0, drafts: int = 3
) -> StepCounts:
    """Counts of a step in which an engine had so many tokens per verification."""
    counts = DraftCounts(verifications, drafts * verifications, round((length - 1) * verifications))
    return {engine: {Versions(policy, 2): counts}}


def test_a_wrong_draft_is_told_once_with_engine_versions_value_and_what_to_turn() -> None:
    watched = alarm()
    (warning,), over = watched.note(7, step(1.02, policy=7))
    assert over == []
    for part in ("step 7", "rollout-0 1.02", "policy 7, draft 2", "draft_acceptance_alarm = 1.05", "/models/head",
                 "enable_draft_training", "NGRAM"):  # fmt: skip
        assert part in warning
    assert watched.note(8, step(1.01)) == ([], [])
    assert watched.note(9, step(1.055)) == ([], []), "barely above is no recovery"
    recovered = "rollout-0 accepts drafts again: 1.50 tokens per verification at step 10"
    assert watched.note(10, step(1.5)) == ([], [recovered])
    assert len(watched.note(11, step(1.05))[0]) == 1, "a new episode is told again"


def test_few_verifications_are_judged_with_those_of_later_steps() -> None:
    watched = alarm()
    few = ENOUGH // 4 + 1
    assert [watched.note(i, step(1.0, verifications=few)) for i in range(3)] == [([], [])] * 3
    assert len(watched.note(3, step(1.0, verifications=few))[0]) == 1


def test_an_engine_that_turns_drafts_off_is_judged_by_what_it_counted_before() -> None:
    wrong = alarm()
    (warning,), _ = wrong.note(0, step(1.0, verifications=ENOUGH_AT_OFF), off=["rollout-0"])
    assert "rollout-0 1.00" in warning
    good = alarm()
    assert good.note(0, step(2.5)) == ([], [])
    assert good.note(1, step(2.0), off=["rollout-0"]) == ([], [])
    for at in range(2, 9):
        assert good.note(at, step(1.0), off=["rollout-0"]) == ([], []), "nothing was drafted"
    assert good.note(9, step(1.0)) == ([], []), "it was off when the step began"
    assert len(good.note(10, step(1.0))[0]) == 1


def test_engines_that_fail_together_are_told_together() -> None:
    watched = alarm()
    counts = {name: step(1.0, engine=name)[name] for name in (f"rollout-{i}" for i in range(6))}
    (warning,), _ = watched.note(0, {**counts, **step(2.0, engine="rollout-9")})
    assert "rollout-0 1.00" in warning
    assert "and 2 engines more" in warning
    assert "rollout-9" not in warning


def test_a_draft_that_is_trained_has_some_steps_to_learn() -> None:
    from_nothing = alarm(TRAINED)
    for at in range(GRACE):
        assert from_nothing.note(at, step(1.03)) == ([], [])
    assert from_nothing.note(GRACE, step(1.5)) == ([], [])
    (warning,), _ = from_nothing.note(GRACE + 1, step(1.0))
    assert "draft/loss" in warning


def test_a_wrong_draft_has_not_drifted_as_well() -> None:
    watched = alarm()
    told = [watched.note(at, step(1.01))[0] for at in range(10)]
    assert [len(warnings) for warnings in told] == [1] + [0] * 9
    lost = alarm()
    for at in range(3):
        assert lost.note(at, step(3.0)) == ([], [])
    (warning,), _ = lost.note(3, step(1.0))
    assert "next to nothing" in warning


def test_drafts_without_a_model_get_advice_that_fits() -> None:
    watched = alarm(DraftSetup(Speculation(DraftKind.NGRAM, num_steps=3), trained=False))
    (warning,), _ = watched.note(4, step(1.0))
    assert "draft_responses_per_prompt" in warning


@pytest.mark.parametrize("kind", [kind for kind in DraftKind if kind is not DraftKind.NONE])
@pytest.mark.parametrize("trained", [False, True])
def test_every_kind_of_draft_gets_advice(kind: DraftKind, trained: bool) -> None:
    watched = alarm(DraftSetup(Speculation(kind, num_steps=3), trained))
    (warning,) = [warning for at in range(GRACE + 1) for warning in watched.note(at, step(1.0))[0]]
    assert "sglang_speculative_algorithm" in warning

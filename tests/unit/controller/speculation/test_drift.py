"""Alarms of drafts that the policy moves away from."""

from __future__ import annotations

from miles.config.speculation import DraftKind, Speculation
from miles.services.controller.speculation.advice import DraftSetup
from miles.services.controller.speculation.draft_counts import DraftCounts, Versions
from miles.services.controller.speculation.drift import ENOUGH, DriftAlarm

FROZEN = DraftSetup(Speculation(DraftKind.EAGLE3, "/models/head", num_steps=3), trained=False)
TRAINED = DraftSetup(Speculation(DraftKind.EAGLE3, None, num_steps=3), trained=True)


def step(length: float, *, policy: int = 0, drafts: int = 3, times: int = 1000) -> list[tuple[Versions, DraftCounts]]:
    """Counts of a step with so many tokens per verification."""
    return [(Versions(policy, 2), DraftCounts(times, drafts * times, round((length - 1) * times)))]


def test_a_draft_that_falls_behind_is_told_once_and_again_when_it_has_caught_up() -> None:
    watched = DriftAlarm(FROZEN)
    for at, length in enumerate((2.9, 3.1, 3.0, 2.8, 2.6)):
        assert watched.note(at, step(length, policy=at)) == ([], [])
    (warning,), _ = watched.note(5, step(2.3, policy=5))
    for part in ("3.00 tokens per verification in the first steps, 2.30 at step 5", "policy 5, draft 2",
                 "enable_draft_training", "sglang_speculative_num_steps"):  # fmt: skip
        assert part in warning
    assert watched.note(6, step(2.0)) == ([], [])
    assert watched.note(7, step(2.6)) == ([], []), "still well below the first steps"
    assert watched.note(8, step(2.9))[1] != []
    assert len(watched.note(9, step(2.0))[0]) == 1, "a new episode is told again"


def test_few_verifications_are_judged_with_those_of_later_steps() -> None:
    watched = DriftAlarm(FROZEN)
    for at in range(3):
        watched.note(at, step(3.0))
    few = ENOUGH // 2
    assert watched.note(3, step(1.5, times=few)) == ([], [])
    assert len(watched.note(4, step(1.5, times=few))[0]) == 1
    assert watched.note(5, []) == ([], [])


def test_fewer_drafts_are_no_drift() -> None:
    watched = DriftAlarm(FROZEN)
    chance = 0.8
    length = {drafts: 1 + sum(chance**i for i in range(1, drafts + 1)) for drafts in (1, 5)}
    for at in range(3):
        watched.note(at, step(length[5], drafts=5))
    assert watched.note(3, step(length[1], drafts=1)) == ([], [])
    (warning,), _ = watched.note(4, step(1 + 0.5, drafts=1))
    assert "of 5.0 drafts each" in warning


def test_a_trained_draft_is_compared_with_its_best_and_gets_other_advice() -> None:
    watched = DriftAlarm(TRAINED)
    for at, length in enumerate((1.0, 1.1, 1.2, 1.6, 2.4, 3.0, 3.0, 3.0, 2.9)):
        assert watched.note(at, step(length)) == ([], [])
    (warning,), _ = watched.note(9, step(2.2))
    assert "3.00 tokens per verification at best, 2.20 at step 9" in warning
    assert "draft_learning_rate" in warning
    assert "enable_draft_training" not in warning


def test_a_draft_that_was_good_for_nothing_and_drafts_without_a_model_do_not_drift() -> None:
    useless = DriftAlarm(FROZEN)
    repeated = DriftAlarm(DraftSetup(Speculation(DraftKind.NGRAM, num_steps=3), trained=False))
    for at, (bad, good) in enumerate(((1.05, 3.0), (1.05, 3.0), (1.05, 3.0), (1.0, 1.2), (1.0, 1.2))):
        assert useless.note(at, step(bad)) == ([], [])
        assert repeated.note(at, step(good)) == ([], [])

"""What follows from counts of drafts."""

from __future__ import annotations

import pytest

from miles.services.controller.speculation.draft_counts import DraftCounts, length_at


def counts(chance: float, drafts: int, verifications: int = 1_000_000) -> DraftCounts:
    """Counts of verifications with `drafts` drafts in a row, each accepted with one chance after those before it."""
    accepted = sum(chance**i for i in range(1, drafts + 1))
    return DraftCounts(verifications, drafts * verifications, round(accepted * verifications))


def test_the_length_counts_the_token_of_the_policy_and_the_rate_does_not() -> None:
    found = DraftCounts(10, 30, 12)
    assert (found.accept_length, found.accept_rate, found.drafts_per_verification) == (2.2, 0.4, 3.0)
    nothing = DraftCounts()
    assert (nothing.accept_length, nothing.accept_rate, nothing.drafts_per_verification) == (None, None, 0.0)


@pytest.mark.parametrize("chance", [0.0, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("drafts", "other"), [(1, 5), (5, 1), (3, 3), (2, 7)])
def test_the_length_with_other_numbers_of_drafts_follows_from_the_chance_of_one(
    chance: float, drafts: int, other: int
) -> None:
    expected = counts(chance, other).accept_length
    assert expected is not None
    assert length_at(counts(chance, drafts), other) == pytest.approx(expected, abs=1e-4)


def test_without_verifications_a_length_is_that_of_the_policy_alone() -> None:
    assert length_at(DraftCounts(), 3) == 1.0

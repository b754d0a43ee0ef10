from __future__ import annotations

from miles.config.speculation import speculation_of
from miles.services.rollout.engines.base import SpeculationCounts
from miles.services.rollout.engines.sglang.speculative.reason import ENOUGH, why_fewer

EAGLE = speculation_of({"speculative_algorithm": "EAGLE"})
NGRAM = speculation_of({"speculative_algorithm": "NGRAM"})


def counts(accepted: int, verified: int = ENOUGH) -> list[SpeculationCounts]:
    return [SpeculationCounts(1, None, 9, 27, 27), SpeculationCounts(2, None, verified, 3 * verified, accepted)]


def test_nothing_is_said_of_drafts_that_do_all_they_may() -> None:
    assert why_fewer(EAGLE, 3, [3, 3], counts(0)) == ""
    assert why_fewer(EAGLE, 3, [], []) == ""
    assert why_fewer(NGRAM, 11, [], counts(ENOUGH)) == ""


def test_servers_that_draft_less_are_counted() -> None:
    assert why_fewer(EAGLE, 3, [0, 3], []).startswith("1 of 2 servers draft nothing now")
    assert why_fewer(EAGLE, 3, [1, 1], []).startswith("1 of 3 steps are drafted now")


def test_drafts_that_cannot_be_turned_off_are_called_what_they_are() -> None:
    assert why_fewer(NGRAM, 11, [], counts(ENOUGH // 50)) == (
        "drafts do not pay at 1.02 tokens per verification, and SGLang cannot change the steps of NGRAM while it runs: "
        "leave them out"
    )
    assert why_fewer(NGRAM, 11, [], counts(0, verified=ENOUGH - 1)) == ""

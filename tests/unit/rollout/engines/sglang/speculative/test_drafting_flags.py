from __future__ import annotations

from typing import Any

import pytest

from miles.config.speculation import speculation_of
from miles.services.rollout.engines.sglang.speculative.drafting_flags import (
    CORPUS_TOKENS,
    corpus_tokens,
    drafting_flags,
    runs_draft_model,
)

SAM, MOST = "speculative_ngram_external_sam_budget", "speculative_ngram_external_corpus_max_tokens"


def added(given: dict[str, Any], *, responses: bool = False) -> dict[str, Any]:
    return drafting_flags(speculation_of(given), given, responses=responses)


def test_servers_draft_chains_as_the_settings_say() -> None:
    eagle = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "d"}
    assert added(eagle) == {
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    }
    assert added({**eagle, "speculative_num_steps": 5, "speculative_eagle_topk": 2}) == {
        "speculative_num_draft_tokens": 6
    }
    assert added({}) == {}


def test_earlier_responses_get_most_of_the_drafts_of_ngram() -> None:
    ngram = {"speculative_algorithm": "NGRAM"}
    assert added(ngram) == {}
    assert added(ngram, responses=True) == {SAM: 8, MOST: 2 * CORPUS_TOKENS}
    assert added({**ngram, "speculative_num_draft_tokens": 4, MOST: 1000}, responses=True) == {SAM: 2}


def test_two_corpora_fit_into_what_a_server_may_hold() -> None:
    assert corpus_tokens({MOST: 1000}) == 500
    assert corpus_tokens({}) == CORPUS_TOKENS


@pytest.mark.parametrize(
    ("algorithm", "expected"), [("EAGLE", True), ("DFLASH", True), ("NGRAM", False), (None, False)]
)
def test_draft_models_are_known(algorithm: str | None, expected: bool) -> None:
    assert runs_draft_model(speculation_of({"speculative_algorithm": algorithm})) is expected

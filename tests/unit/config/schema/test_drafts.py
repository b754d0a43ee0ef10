from __future__ import annotations

from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig

SGLANG: dict[str, Any] = {"rollout_backend": "sglang"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, 0),
        ({"sglang_speculative_algorithm": "NGRAM"}, 4),
        ({"sglang_speculative_algorithm": "NGRAM", "draft_responses_per_prompt": 0}, 0),
        ({"sglang_speculative_algorithm": "NGRAM", "draft_responses_per_prompt": 9}, 9),
        ({"sglang_speculative_algorithm": "EAGLE"}, 0),
    ],
)
def test_earlier_responses_are_kept_for_drafts_without_a_model(given: dict[str, Any], kept: int) -> None:
    assert JobConfig.from_flat(MINIMAL | SGLANG | given).drafts.draft_responses_per_prompt == kept


@pytest.mark.parametrize(
    ("given", "steps"),
    [({}, 3), ({"sglang_speculative_num_steps": 5}, 5), ({"draft_unroll_steps": 2}, 2)],
)
def test_a_head_is_trained_over_the_steps_that_it_drafts_unless_others_are_given(
    given: dict[str, Any], steps: int
) -> None:
    trained = {"sglang_speculative_algorithm": "EAGLE3", "enable_draft_training": True}
    assert JobConfig.from_flat(MINIMAL | SGLANG | trained | given).drafts.draft_unroll_steps == steps

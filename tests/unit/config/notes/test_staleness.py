"""The warning about samples of old versions that nothing bounds."""

from __future__ import annotations

from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.job import examine
from miles.config.notes import notes
from miles.config.notes.staleness import staleness_warning


def warning(**changes: Any) -> str:
    examination = examine({**MINIMAL, "max_weight_staleness": 3, **changes})
    assert examination.faults == []
    return staleness_warning(examination.settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "the ratio that is clipped is 1"),
        ({"advantage_estimator": "rloo"}, "the ratio that is clipped is 1"),
        ({"use_tis": True, "tis_clip": 5e8}, "tis_clip = 5e+08 bounds no weight"),
        ({"use_mis": True, "use_tis": True, "tis_upper_bound": 1e6}, "tis_upper_bound = 1e+06 bounds no weight"),
        (
            {"advantage_estimator": "cispo", "use_rollout_logprobs": True, "eps_clip_high": 1e4},
            "eps_clip_high = 10000 clips no ratio",
        ),
    ],
)
def test_what_nothing_bounds_is_said_with_ways_out(changes: dict[str, Any], said: str) -> None:
    text = warning(**changes)
    assert said in text
    assert "use_rollout_logprobs, with grpo, gspo or cispo" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"max_weight_staleness": 1},
        {"use_rollout_logprobs": True},
        {"use_tis": True},
        {"use_icepop": True},
        {"keep_old_actor": True},
        {"num_steps_per_rollout": 2},
        {"use_mis": True, "use_rs": True},
        {"advantage_estimator": "cispo", "use_rollout_logprobs": True, "eps_clip": 1.0, "eps_clip_high": 4.0},
    ],
)
def test_what_is_bounded_is_not_warned_of(changes: dict[str, Any]) -> None:
    assert warning(**changes) == ""


def test_a_dry_run_has_it_as_a_note() -> None:
    settings = examine({**MINIMAL, "max_weight_staleness": 3}).settings
    assert [note.field for note in notes(settings)] == ["max_weight_staleness"]

"""Each part of a sample that does not fit the others is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from miles.types import Sample, SampleStatus, VersionSpan, sample_faults
from miles.types.experts import ExpertLayout

LAYOUT = ExpertLayout(layers=3, moe_layers=(1, 2), top_k=2, experts=4)


def sample(**changes: Any) -> Sample:
    """Two prompt and three response tokens of two versions, in a model of `LAYOUT`."""
    whole = Sample(
        group_id=7,
        index=1,
        prompt="p",
        tokens=np.array([5, 6, 7, 8, 9], np.int32),
        response_length=3,
        response="r",
        reward=1.0,
        loss_mask=np.ones(3, np.uint8),
        status=SampleStatus.COMPLETED,
        rollout_log_probs=np.array([-0.5, -2.0, 0.0], np.float32),
        rollout_routed_experts=experts(),
        weight_versions=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 3)),
    )
    return dataclasses.replace(whole, **changes)


def experts(*, row: int = 0, layer: int = 0, chosen: tuple[int, int] = (2, 0), dtype: type = np.uint8) -> np.ndarray:
    made = np.tile(np.array([0, 3], dtype), (4, 2, 1))
    made[row, layer] = chosen
    return made


@pytest.mark.parametrize("layout", [None, LAYOUT])
def test_a_sample_whose_parts_fit_has_no_fault(layout: ExpertLayout | None) -> None:
    assert sample_faults(sample(), layout, needs_routing=True) == []
    assert sample_faults(sample(loss_mask=None, rollout_routed_experts=None), layout) == []
    new = Sample(group_id=0, index=0, prompt="p", tokens=np.array([1], np.int32))
    assert sample_faults(new, layout, needs_routing=True) == []


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"tokens": np.arange(5)}, "tokens", "dtype int64; expected int32"),
        ({"tokens": np.array([5, 6, 7, -8, 9], np.int32)}, "tokens", "token 3 is -8"),
        ({"tokens": np.array([5, 6, 7, 8], np.int32)}, "rollout_routed_experts", "for 4 tokens; expected (3,"),
        ({"loss_mask": np.ones(2, np.uint8)}, "loss_mask", "2 entries, but response_length is 3"),
        ({"loss_mask": np.array([0, 1, 2], np.uint8)}, "loss_mask", "entry 2 is 2; allowed: 0 and 1"),
        ({"loss_mask": np.ones(3, np.float32)}, "loss_mask", "dtype float32; expected uint8"),
        ({"rollout_log_probs": np.zeros(4, np.float32)}, "rollout_log_probs", "4 entries, but response_length is 3"),
        ({"rollout_log_probs": np.array([0, np.nan, 0], np.float32)}, "rollout_log_probs", "entry 1 is nan"),
        ({"rollout_log_probs": np.array([0, 0, 0.5], np.float32)}, "rollout_log_probs", "entry 2 is 0.5"),
        ({"rollout_log_probs": None}, "rollout_log_probs", "none for 3 response tokens"),
        ({"weight_versions": ()}, "weight_versions", "cover 0 response tokens, but response_length is 3"),
        ({"weight_versions": (VersionSpan(3, 0, 2),)}, "weight_versions", "cover 2 response tokens"),
        ({"weight_versions": (VersionSpan(3, 0, 1), VersionSpan(4, 2, 3))}, "weight_versions[1].start", "expected 1"),
        ({"weight_versions": (VersionSpan(3, 0, 0), VersionSpan(4, 0, 3))}, "weight_versions[0].end", "more than"),
        ({"rollout_routed_experts": experts()[:3]}, "rollout_routed_experts", "expected (4, moe_layers, top_k)"),
        ({"rollout_routed_experts": experts(dtype=np.int32)}, "rollout_routed_experts", "dtype int32"),
        ({"rollout_routed_experts": experts()[:, :1]}, "rollout_routed_experts", "1 layers and 2 experts a token; the"),
        (
            {"rollout_routed_experts": experts(row=2, layer=1, chosen=(1, 4))},
            "rollout_routed_experts",
            "choice 1 of token 2 in layer 1 is expert 4; the model's 4 experts count from 0",
        ),
        (
            {"rollout_routed_experts": experts(row=3, chosen=(1, 1))},
            "rollout_routed_experts",
            "token 3 goes to experts [1, 1] in layer 0; a token's experts differ",
        ),
        ({"rollout_routed_experts": None}, "rollout_routed_experts", "none for 5 tokens"),
        ({"reward": float("nan")}, "reward", "a reward is a finite double"),
    ],
)
def test_each_corruption_is_named_and_alone(changes: dict[str, Any], field: str, problem: str) -> None:
    faults = sample_faults(sample(**changes), LAYOUT, needs_routing=True)
    assert [fault.field for fault in faults] == [field]
    assert problem in faults[0].problem
    assert str(faults[0]) == f"{field}: {faults[0].problem}"


def test_a_response_that_ended_has_tokens_and_a_prompt() -> None:
    empty = Sample(group_id=0, index=0, prompt="p", tokens=np.array([1], np.int32), status=SampleStatus.COMPLETED)
    assert [str(fault) for fault in sample_faults(empty)] == [
        "status: COMPLETED, but there is no response; expected PENDING or FAILED"
    ]
    bare = sample(tokens=np.array([7, 8, 9], np.int32), rollout_routed_experts=None)
    assert [fault.field for fault in sample_faults(bare)] == ["tokens"]


def test_all_faults_of_a_sample_are_named_at_once() -> None:
    broken = sample(
        loss_mask=np.ones(1, np.uint8),
        rollout_log_probs=np.array([1, 0, 0], np.float32),
        rollout_routed_experts=np.zeros((4, 2, 2), np.uint8),
        weight_versions=(),
    )
    assert [fault.field for fault in sample_faults(broken)] == [
        "loss_mask",
        "weight_versions",
        "rollout_log_probs",
        "rollout_routed_experts",
    ]


def test_a_wrong_length_of_the_response_shows_in_all_that_goes_by_it() -> None:
    faults = sample_faults(sample(response_length=6))
    assert str(faults[0]) == "response_length: 6, but there are only 5 tokens"
    assert [fault.field for fault in faults[1:]] == ["loss_mask", "rollout_log_probs", "weight_versions"]


def test_a_failed_sample_may_lack_anything() -> None:
    failed = sample(status=SampleStatus.FAILED, rollout_log_probs=None, rollout_routed_experts=None, reward=None)
    assert sample_faults(failed, LAYOUT, needs_routing=True) == []

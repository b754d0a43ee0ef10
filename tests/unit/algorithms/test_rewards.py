import math

import algorithm_reference as reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.algorithms import AdvantageConfig, shape_rewards

finite = st.floats(-100, 100, allow_nan=False, width=32)


def shape(estimator: str, rewards: list[float], ids: list[int], **config: bool) -> list[float]:
    return shape_rewards(AdvantageConfig(advantage_estimator=estimator, **config), rewards, ids).tolist()


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo"])
def test_group_rewards_are_standardised_by_hand(estimator: str) -> None:
    # Group 7: rewards 1, 0, 0, 1: mean 0.5, unbiased std sqrt(1/3). Group 9: 2, 4: mean 3, std sqrt(2).
    shaped = shape(estimator, [1, 2, 0, 0, 4, 1], [7, 9, 7, 7, 9, 7])
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-6), 1 / (math.sqrt(2) + 1e-6)
    assert shaped == pytest.approx([a, -b, -a, -a, b, a], abs=1e-6)


def test_without_std_only_the_mean_is_subtracted() -> None:
    assert shape("grpo", [1, 0, 0, 1], [0] * 4, grpo_std_normalization=False) == [0.5, -0.5, -0.5, 0.5]
    assert shape("dr_grpo", [1, 0, 0, 1], [0] * 4) == [0.5, -0.5, -0.5, 0.5]
    assert shape("reinforce_plus_plus_baseline", [1, 0, 0, 1], [0] * 4) == [0.5, -0.5, -0.5, 0.5]


def test_rloo_compares_each_sample_with_the_others() -> None:
    # Others' means of 1, 2, 6: 4, 3.5, 1.5.
    assert shape("rloo", [1, 2, 6], [0, 0, 0]) == pytest.approx([-3.0, -1.5, 4.5])


@pytest.mark.parametrize("estimator", ["ppo", "reinforce_plus_plus"])
def test_estimators_without_a_group_baseline_keep_rewards(estimator: str) -> None:
    assert shape(estimator, [1, 0.5, 2], [0, 0, 0]) == [1, 0.5, 2]


def test_normalisation_can_be_switched_off() -> None:
    assert shape("grpo", [1, 0.5, 2], [0, 0, 0], rewards_normalization=False) == [1, 0.5, 2]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_groups_of_one_and_groups_without_spread_give_zero(estimator: str) -> None:
    assert shape(estimator, [0.3, 0.1, 0.1, 0.1], [5, 6, 6, 6]) == pytest.approx([0, 0, 0, 0], abs=1e-9)


@pytest.mark.parametrize("reward", [0.1, 0.7, -1 / 3])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_group_without_spread_gives_zero_and_not_the_rounding_of_its_mean(
    estimator: str, reward: float, n: int
) -> None:
    assert shape(estimator, [reward] * n, [0] * n) == [0.0] * n


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), 1e300, -1e38])
def test_rewards_that_float32_does_not_hold_are_refused_by_name(reward: float) -> None:
    with pytest.raises(ValueError, match="reward of sample 1 is"):
        shape("ppo", [1.0, reward], [0, 0])


@given(st.lists(st.tuples(finite, st.integers(0, 3)), min_size=1, max_size=12))
def test_any_grouping_matches_the_reference(pairs: list[tuple[float, int]]) -> None:
    rewards, ids = [p[0] for p in pairs], [p[1] for p in pairs]
    shaped = shape("grpo", rewards, ids)
    for group in set(ids):
        members = [i for i, g in enumerate(ids) if g == group]
        values = [rewards[i] for i in members]
        if len(set(values)) > 1:
            assert [shaped[i] for i in members] == pytest.approx(
                reference.group_standardized(values), abs=1e-5, rel=1e-5
            )
        else:
            assert [shaped[i] for i in members] == pytest.approx([0.0] * len(members), abs=1e-5)


def test_faulty_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="reward of sample 1 is nan"):
        shape("grpo", [1.0, math.nan], [0, 0])
    with pytest.raises(ValueError, match="2 rewards but 3 group ids"):
        shape("grpo", [1.0, 2.0], [0, 0, 1])


def test_group_ids_may_be_a_tensor_or_any_hashable() -> None:
    config = AdvantageConfig()
    by_name = shape_rewards(config, torch.tensor([1.0, 0.0, 3.0, 5.0]), ["a", "a", "b", "b"])
    by_number = shape_rewards(config, torch.tensor([1.0, 0.0, 3.0, 5.0]), torch.tensor([1, 1, 0, 0]))
    assert torch.equal(by_name, by_number)

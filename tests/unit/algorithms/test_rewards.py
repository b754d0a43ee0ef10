import itertools
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


def test_maxrl_divides_by_the_groups_mean() -> None:
    # One success of four: mean 1/4. Three of four: 3/4. Two graded ones: mean 0.4.
    shaped = shape("maxrl", [1, 0, 0, 0, 1, 1, 1, 0, 0.2, 0.6], [0] * 4 + [1] * 4 + [2] * 2)
    assert shaped == pytest.approx([3, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1, -0.5, 0.5])


def test_maxrl_learns_nothing_where_all_fail_or_all_succeed() -> None:
    assert shape("maxrl", [0, 0, 0.1, 0.1, 0.1], [0, 0, 1, 1, 1]) == [0.0] * 5


def test_maxrls_advantages_give_the_gradient_of_the_truncated_log_likelihood() -> None:
    # The truncation of log p at order m has the derivative sum over k < m of (1 - p)^k (2602.02710). The expectation of
    # mean_i A_i d log pi(y_i) / dp over all outcomes of N draws with success probability p is that of m = N - 1: groups
    # without a success are left out, also by the baseline.
    n, p = 4, 0.3
    expected = sum((1 - p) ** k for k in range(n - 1))
    found = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=n):
        probability = math.prod(p if r else 1 - p for r in outcome)
        scores = [1 / p if r else -1 / (1 - p) for r in outcome]
        advantages = shape("maxrl", list(outcome), [0] * n)
        found += probability * sum(a * s for a, s in zip(advantages, scores, strict=True)) / n
    assert found == pytest.approx(expected, rel=1e-6)


def test_maxrl_refuses_negative_rewards() -> None:
    with pytest.raises(ValueError, match=r"one of them is -0\.5; give rewards of at least 0"):
        shape("maxrl", [1, -0.5], [0, 0])


def gdpo(rewards: list[list[float]], ids: list[int], weights: tuple[float, ...], **config: bool) -> list[float]:
    options = AdvantageConfig(advantage_estimator="gdpo", reward_weights=weights, **config)
    return shape_rewards(options, torch.tensor(rewards, dtype=torch.float64), ids).tolist()


def test_gdpo_normalises_each_reward_then_their_weighted_sum_over_the_batch() -> None:
    rewards = [[1.0, 3.0], [0.0, 1.0], [0.0, 8.0], [1.0, 4.0], [1.0, 0.0], [1.0, 2.0]]
    ids, weights = [7, 7, 7, 9, 9, 9], (1.0, 0.25)
    columns = []
    for k in range(2):
        groups = [[r[k] for r, i in zip(rewards, ids, strict=True) if i == g] for g in (7, 9)]
        columns.append([x for group in groups for x in reference.group_standardized(group)])
    summed = [a + 0.25 * b for a, b in zip(*columns, strict=True)]
    mean = math.fsum(summed) / 6
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in summed) / 5)
    assert mean == pytest.approx(0, abs=1e-12)
    assert gdpo(rewards, ids, weights) == pytest.approx([(x - mean) / (std + 1e-6) for x in summed], rel=1e-6)


def test_gdpo_keeps_apart_what_a_sum_would_confuse() -> None:
    # Sums are 1, 1 and 0: the first two differ in which reward they won, and a rare one counts for more.
    rewards = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    first, second, third, _ = gdpo(rewards, [0] * 4, (1.0, 1.0))
    assert shape("grpo", [sum(r) for r in rewards], [0] * 4)[0] == shape("grpo", [sum(r) for r in rewards], [0] * 4)[1]
    assert first > second > third


def test_gdpo_gives_exactly_zero_to_groups_without_spread() -> None:
    shaped = gdpo([[0.1, 0.7]] * 3 + [[1.0, 0.0], [0.0, 0.0], [0.1, 0.2]], [0, 0, 0, 1, 1, 1], (1.0, 2.0))
    assert shaped[:3] == [0.0] * 3
    assert all(shaped[3:])
    assert gdpo([[0.3, 0.3]] * 2, [0, 0], (1.0, 1.0)) == [0.0, 0.0]


def test_gdpo_without_group_standard_deviations_centres_each_reward() -> None:
    shaped = gdpo([[1.0, 0.0], [0.0, 4.0]], [0, 0], (1.0, 0.5), grpo_std_normalization=False)
    summed = [0.5 - 1.0, -0.5 + 1.0]
    assert shaped == pytest.approx([x / (math.sqrt(0.5) + 1e-6) for x in summed])


def test_gdpo_needs_as_many_weights_as_rewards() -> None:
    with pytest.raises(ValueError, match="zip"):
        gdpo([[1.0, 0.0, 1.0]], [0], (1.0, 1.0))

"""The reverse KL to a teacher over sets of tokens: worked values, and the choice of the sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from miles.algorithms import AdvantageBatch, AdvantageConfig, Packing, compute_advantages
from miles.algorithms.distillation import WeightMode, top_k_reverse_kl
from miles.distillation.token_choice import choose_tokens, pick


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


STUDENT, TEACHER = logs([0.5, 0.3, 0.1]), logs([0.25, 0.6, 0.1])
GAPS = [math.log(2), math.log(0.5), 0.0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("student_p", (0.5 * GAPS[0] + 0.3 * GAPS[1]) / 0.9),
        ("teacher_p", (0.25 * GAPS[0] + 0.6 * GAPS[1]) / 0.95),
        ("none", (GAPS[0] + GAPS[1]) / 3),
    ],
)
def test_the_mean_gap_by_hand(mode: WeightMode, expected: float) -> None:
    everything = torch.ones(1, 3, dtype=torch.bool)
    found = top_k_reverse_kl(STUDENT, TEACHER, everything, mode)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("student_p", 0.5 * GAPS[0]), ("teacher_p", 0.25 * GAPS[0]), ("none", GAPS[0])],
)
def test_weights_that_are_not_divided_by_their_sum(mode: WeightMode, expected: float) -> None:
    chosen = torch.tensor([[True, False, True]])
    found = top_k_reverse_kl(STUDENT, TEACHER, chosen, mode, normalize=False)
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_empty_set_says_nothing_and_what_is_no_member_may_be_anything(normalize: bool) -> None:
    student = torch.tensor([[-1.0, torch.nan], [-torch.inf, torch.nan]])
    teacher = torch.tensor([[-3.0, torch.inf], [torch.nan, -1.0]])
    chosen = torch.tensor([[True, False], [False, False]])
    found = top_k_reverse_kl(student, teacher, chosen, "none", normalize=normalize)
    assert found.tolist() == [2.0, 0.0]


def test_over_the_whole_vocabulary_it_is_the_exact_divergence() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 17, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (student.exp() * (student - teacher)).sum(-1)
    for normalize in (True, False):
        found = top_k_reverse_kl(student, teacher, torch.ones(5, 17, dtype=torch.bool), normalize=normalize)
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("only-student", [[4, 7, 2]]),
        ("only-teacher", [[2, 9, 4]]),
        ("intersection", [[4, -1, 2]]),
        ("union", [[4, 7, 2, -1, 9, -1]]),
        ("xor", [[-1, 7, -1, -1, 9, -1]]),
    ],
)
def test_strategies(strategy: str, expected: list[list[int]]) -> None:
    student, teacher = np.array([[4, 7, 2]], np.int32), np.array([[2, 9, 4]], np.int32)
    assert choose_tokens(strategy, student, teacher).tolist() == expected


def test_a_strategy_needs_its_likeliest_tokens() -> None:
    with pytest.raises(ValueError, match="opd_top_k_strategy = union needs likeliest tokens"):
        choose_tokens("union", np.zeros((1, 1), np.int32), None)


def test_known_values_are_picked_by_token() -> None:
    known, values = np.array([[5, 3], [1, -1]], np.int32), np.array([[0.5, 0.3], [0.1, -np.inf]], np.float32)
    found = pick(np.array([[3, 4, 5], [2, 1, 1]], np.int32), known, values)
    np.testing.assert_array_equal(found, np.array([[0.3, np.nan, 0.5], [np.nan, 0.1, 0.1]], np.float32))


def test_it_takes_the_place_of_the_sampled_tokens_gap_in_advantages() -> None:
    packing = Packing((2, 1))
    batch = AdvantageBatch(
        packing=packing,
        mask_T=torch.ones(3),
        rewards_B=torch.tensor([1.0, -1.0]),
        opd_reverse_kl_T=torch.tensor([0.5, 0.0, -2.0]),
    )
    found = compute_advantages(AdvantageConfig(use_opd=True, opd_kl_coef=0.5), batch)
    assert found.advantages_T.tolist() == [0.75, 1.0, 0.0]

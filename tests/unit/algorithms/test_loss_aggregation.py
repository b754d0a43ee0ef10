import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.algorithms import MetricMax, MetricSum, Packing, aggregate, reduce_metrics

PACKING = Packing((2, 3, 2))
VALUES_T = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0, torch.nan, torch.inf])
MASK_T = torch.tensor([1, 1, 1, 0, 1, 0, 0])


def test_mean_of_sample_means_by_hand() -> None:
    # (1 + 3) / 2 + (10 + 30) / 2 + 0, over three rollouts.
    assert aggregate(VALUES_T, MASK_T, PACKING).item() == pytest.approx(22 / 3)


def test_mean_of_tokens_by_hand() -> None:
    assert aggregate(VALUES_T, MASK_T, PACKING, per_token=True).item() == pytest.approx(44 / 4)


def test_constant_length_by_hand() -> None:
    assert aggregate(VALUES_T, MASK_T, PACKING, constant_length=8).item() == pytest.approx(44 / 8 / 3)


def test_rejection_changes_the_numerator_alone() -> None:
    keep_T = torch.tensor([1, 0, 1, 1, 1, 1, 1])
    assert aggregate(VALUES_T, MASK_T, PACKING, keep_T=keep_T).item() == pytest.approx((1 / 2 + 20) / 3)
    assert aggregate(VALUES_T, MASK_T, PACKING, keep_T=keep_T, per_token=True).item() == pytest.approx(41 / 4)


def test_a_rollout_that_became_two_samples_weighs_as_one() -> None:
    # The first two samples are one rollout of four unmasked tokens.
    mask_sums_B = torch.tensor([4.0, 4.0, 0.0])
    total = aggregate(VALUES_T, MASK_T, PACKING, mask_sums_B=mask_sums_B, denominator=2)
    assert total.item() == pytest.approx(44 / 4 / 2)


def test_masked_and_rejected_values_have_no_gradient() -> None:
    values_T = VALUES_T.clone().requires_grad_()
    keep_T = torch.tensor([1, 0, 1, 1, 1, 1, 1])
    aggregate(values_T, MASK_T, PACKING, keep_T=keep_T).backward()
    assert values_T.grad is not None
    assert values_T.grad.tolist() == pytest.approx([1 / 6, 0, 1 / 6, 0, 1 / 6, 0, 0])


@pytest.mark.parametrize("per_token", [False, True])
def test_nothing_to_train_on_gives_zero_with_a_gradient(per_token: bool) -> None:
    for packing, size in ((Packing((2,)), 2), (Packing(()), 0)):
        values_T = torch.zeros(size, requires_grad=True)
        loss = aggregate(values_T, torch.zeros(size), packing, per_token=per_token)
        loss.backward()
        assert loss.item() == 0


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=7),
    assignment=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    per_token=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_parts_add_up_to_the_whole(lengths: list[int], assignment: list[int], per_token: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packing = Packing(tuple(lengths))
    values_T = torch.randn(packing.num_tokens, generator=generator)
    mask_T = (torch.rand(packing.num_tokens, generator=generator) > 0.4).int()
    whole = aggregate(values_T, mask_T, packing, per_token=per_token)
    denominator = float(mask_T.sum()) if per_token else len(lengths)
    parts = []
    for part in range(4):
        samples = [i for i in range(len(lengths)) if assignment[i] == part]
        parts.append(
            aggregate(
                packing.take(values_T, samples),
                packing.take(mask_T, samples),
                packing.subset(samples),
                denominator=denominator,
                per_token=per_token,
            )
        )
    torch.testing.assert_close(torch.stack(parts).sum(), whole, atol=1e-6, rtol=1e-6)


def test_padded_rows_give_the_same_numbers() -> None:
    padded_values, padded_mask = PACKING.unpack(VALUES_T), PACKING.unpack(MASK_T)
    as_rows = Packing((3, 3, 3))
    packed = aggregate(VALUES_T, MASK_T, PACKING)
    padded = aggregate(as_rows.pack(padded_values), as_rows.pack(padded_mask), as_rows)
    assert torch.equal(packed, padded)


def test_metrics_are_divided_once_over_all_parts() -> None:
    parts = [
        {"a": MetricSum(torch.tensor(1.0), 1), "b": MetricSum(torch.tensor(5.0), 0)},
        {"a": MetricSum(torch.tensor(9.0), 4), "b": MetricSum(torch.tensor(5.0), 0)},
    ]
    assert reduce_metrics(parts) == {"a": 2.0, "b": 0.0}
    assert reduce_metrics([]) == {}


def test_the_largest_of_all_parts_is_a_maximum() -> None:
    parts = [{"a": MetricMax(torch.tensor(value)), "b": MetricSum(torch.tensor(value), 1)} for value in (0.5, 2.0, 1.0)]
    assert reduce_metrics(parts) == {"a": 2.0, "b": pytest.approx(3.5 / 3)}

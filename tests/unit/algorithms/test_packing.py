import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.algorithms import Packing

lengths_lists = st.lists(st.integers(0, 6), min_size=0, max_size=6)


@given(lengths_lists)
def test_padding_and_packing_are_inverse(lengths: list[int]) -> None:
    packing = Packing(tuple(lengths))
    x_T = torch.arange(float(sum(lengths)))
    assert torch.equal(packing.pack(packing.unpack(x_T, padding_value=-1.0)), x_T)


@given(lengths_lists)
def test_cumulative_lengths_describe_the_packing(lengths: list[int]) -> None:
    packing = Packing(tuple(lengths))
    assert Packing.from_cu_seqlens(packing.cu_seqlens()) == packing


def test_sums_and_means_are_taken_within_samples() -> None:
    packing = Packing((2, 0, 3))
    x_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    mask_T = torch.tensor([1, 1, 0, 1, 1])
    assert packing.sum(x_T).tolist() == [3.0, 0.0, 12.0]
    assert packing.mean(x_T, mask_T).tolist() == [1.5, 0.0, 4.5]
    assert packing.expand(torch.tensor([7.0, 8.0, 9.0])).tolist() == [7.0, 7.0, 9.0, 9.0, 9.0]


def test_taking_samples_keeps_the_order_given() -> None:
    packing = Packing((1, 2, 3))
    x_T = torch.arange(6)
    assert packing.take(x_T, [2, 0]).tolist() == [3, 4, 5, 0]
    assert packing.subset([2, 0]) == Packing((3, 1))
    assert packing.take(x_T, []).tolist() == []


def test_a_samples_sum_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n) for n in (1, 700, 33)]
    together = Packing((1, 700, 33)).sum(torch.cat(parts))
    alone = torch.cat([Packing((len(part),)).sum(part) for part in parts])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("bad", [[1, 2], [0, 3, 2], []])
def test_faulty_cumulative_lengths_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        Packing.from_cu_seqlens(bad)


def test_a_tensor_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"mask_T has shape \(4,\), but the packing holds 5 tokens"):
        Packing((2, 3)).check(log_probs_T=torch.zeros(5), mask_T=torch.zeros(4))


def test_padded_rows_too_short_for_their_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        Packing((2, 3)).pack(torch.zeros(2, 2))


def test_the_gradient_of_a_samples_sum_is_that_of_each_of_its_tokens_and_back() -> None:
    packing = Packing((2, 0, 3))
    x_T = torch.arange(5.0, requires_grad=True)
    (packing.sum(x_T) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x_T.grad is not None
    assert x_T.grad.tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]
    x_B = torch.ones(3, requires_grad=True)
    (packing.expand(x_B) * torch.arange(5.0)).sum().backward()
    assert x_B.grad is not None
    assert x_B.grad.tolist() == [1.0, 0.0, 9.0]


def test_flags_are_counted_and_no_samples_have_no_sums() -> None:
    assert Packing((2, 1)).sum(torch.tensor([True, True, False])).tolist() == [2, 0]
    assert Packing(()).sum(torch.zeros(0)).shape == (0,)
    assert Packing(()).expand(torch.zeros(0)).shape == (0,)

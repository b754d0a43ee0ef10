import math

import algorithm_reference as reference
import pytest
import torch

from miles.algorithms import approximate_kl

KL_TYPES = ["k1", "k2", "k3", "low_var_kl"]


@pytest.mark.parametrize(
    ("kl_type", "expected"),
    [
        ("k1", math.log(2)),
        ("k2", math.log(2) ** 2 / 2),
        ("k3", 0.5 - 1 + math.log(2)),
        ("low_var_kl", math.log(2) - 0.5),
    ],
)
def test_twice_the_base_probability_by_hand(kl_type: str, expected: float) -> None:
    kl = approximate_kl(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]), kl_type)
    assert kl.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kl_type", KL_TYPES)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_the_reference(kl_type: str, unbiased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    new, base, old = (-3 * torch.rand(50).to(dtype) for _ in range(3))
    kl = approximate_kl(new, base, kl_type, old if unbiased else None)
    expected = [
        reference.kl(n, b, kl_type, o if unbiased else None)
        for n, b, o in zip(new.tolist(), base.tolist(), old.tolist(), strict=True)
    ]
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(kl.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kl_type", KL_TYPES)
@pytest.mark.parametrize("unbiased", [False, True])
def test_gradients_match_finite_differences(kl_type: str, unbiased: bool) -> None:
    torch.manual_seed(2)
    new = (-2 * torch.rand(6, dtype=torch.float64)).requires_grad_()
    base, old = -2 * torch.rand(6, dtype=torch.float64), -2 * torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: approximate_kl(x, base, kl_type, old if unbiased else None), new)


@pytest.mark.parametrize("log_ratio", [-200.0, -50.0, 50.0, 200.0])
@pytest.mark.parametrize("unbiased", [False, True])
def test_low_var_kl_stays_within_ten_with_finite_gradients(log_ratio: float, unbiased: bool) -> None:
    new = torch.tensor([log_ratio], requires_grad=True)
    kl = approximate_kl(new, torch.zeros(1), "low_var_kl", torch.zeros(1) if unbiased else None)
    kl.sum().backward()
    assert kl.abs().item() <= 10
    assert new.grad is not None
    assert new.grad.isfinite().all()


def test_equal_log_probs_have_no_kl() -> None:
    x = torch.randn(20)
    for kl_type in KL_TYPES:
        assert approximate_kl(x, x, kl_type, x - 1).abs().max() == 0


def test_an_unknown_estimate_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'k4'; choose from k1, k2, k3, low_var_kl"):
        approximate_kl(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, 100.0, 1e4])
def test_k3_far_from_the_reference_fits_float32_with_its_gradient(log_ratio: float, unbiased: bool) -> None:
    new = torch.tensor([log_ratio], requires_grad=True)
    kl = approximate_kl(new, torch.zeros(1), "k3", torch.zeros(1) if unbiased else None)
    kl.sum().backward()
    bounded = max(log_ratio, -40)
    plain = math.exp(-bounded) - 1 + bounded
    if unbiased:
        plain *= math.exp(min(max(log_ratio, -40), 40))
    assert kl.item() == pytest.approx(plain, rel=1e-5)
    assert new.grad.isfinite().all()

import algorithm_reference as reference
import pytest
import torch

from miles.algorithms import masked_whiten


def test_by_hand() -> None:
    # Unmasked 1, 3: mean 2, unbiased variance 2. The masked 5 goes through the same map.
    whitened = masked_whiten(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([1, 0, 1]))
    assert whitened.tolist() == pytest.approx([-(2**-0.5), 3 * 2**-0.5, 2**-0.5], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_the_reference_far_from_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = (100 + torch.randn(200)).to(dtype)
    mask = torch.rand(200) > 0.3
    whitened = masked_whiten(values, mask)
    expected = reference.whitened(values.double().tolist(), mask.tolist())
    torch.testing.assert_close(whitened.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_one_token_and_equal_tokens_become_zero() -> None:
    assert masked_whiten(torch.tensor([4.0, 9.0]), torch.tensor([1, 0]))[0] == 0
    assert masked_whiten(torch.full((5,), 0.1), torch.ones(5)).abs().max() < 1e-9


def test_nothing_unmasked_gives_zeros() -> None:
    assert masked_whiten(torch.tensor([4.0, torch.nan]), torch.zeros(2)).tolist() == [0.0, 0.0]


def test_masked_values_do_not_touch_the_statistics() -> None:
    mask = torch.tensor([1, 1, 0, 1])
    a = masked_whiten(torch.tensor([1.0, 2.0, torch.inf, 4.0]), mask)
    b = masked_whiten(torch.tensor([1.0, 2.0, 0.0, 4.0]), mask)
    assert torch.equal(a[mask.bool()], b[mask.bool()])

import pytest
import torch

from miles.algorithms import linear_sum_squared_probs, sum_squared_probs


@pytest.mark.parametrize("chunk_rows", [None, 1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_squares_of_the_softmax(temperature: float, chunk_rows: int | None) -> None:
    torch.manual_seed(0)
    logits_TV = 4 * torch.randn(7, 11)
    logits_TV[2, 3:] = -torch.inf
    logits_TV[3] = 500 * torch.randn(11)
    expected_T = (logits_TV.double() / temperature).softmax(-1).square().sum(-1)
    found_T = sum_squared_probs(logits_TV, temperature=temperature, chunk_rows=chunk_rows)
    assert found_T.dtype == torch.float32
    torch.testing.assert_close(found_T.double(), expected_T, atol=1e-6, rtol=1e-5)
    half_T = sum_squared_probs(logits_TV.bfloat16(), temperature=temperature)
    torch.testing.assert_close(half_T, sum_squared_probs(logits_TV.bfloat16().float(), temperature=temperature))


def test_hidden_states_give_the_same() -> None:
    torch.manual_seed(1)
    hidden_TD, weight_VD = torch.randn(9, 4), torch.randn(13, 4)
    expected_T = sum_squared_probs(hidden_TD @ weight_VD.T, temperature=0.8)
    for rows in (None, 2):
        found_T = linear_sum_squared_probs(hidden_TD, weight_VD, temperature=0.8, chunk_rows=rows)
        torch.testing.assert_close(found_T, expected_T)


def test_no_rows_give_nothing() -> None:
    assert sum_squared_probs(torch.zeros(0, 5)).tolist() == []
    assert linear_sum_squared_probs(torch.zeros(0, 3), torch.zeros(5, 3)).tolist() == []

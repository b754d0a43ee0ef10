import pytest
import torch

from miles.algorithms import TokenLogProbs, linear_token_log_probs, token_log_probs


def example(dtype: torch.dtype = torch.float32, rows: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(rows, 24, generator=generator).to(dtype)
    weight_VD = (0.5 * torch.randn(101, 24, generator=generator)).to(dtype)
    return hidden_TD, weight_VD, torch.randint(0, 101, (rows,), generator=generator)


def loss_of(scored: TokenLogProbs) -> torch.Tensor:
    weights_T = torch.linspace(-1, 2, len(scored.log_probs_T), dtype=scored.log_probs_T.dtype)
    loss = (weights_T * scored.log_probs_T).sum()
    return loss if scored.entropy_T is None else loss + (weights_T.flip(0).cos() * scored.entropy_T).sum()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("chunk_rows", [16, 20, None])
def test_values_and_gradients_match_float64(with_entropy: bool, chunk_rows: int | None) -> None:
    hidden_TD, weight_VD, tokens_T = example()
    inputs = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    scored = linear_token_log_probs(
        *inputs, tokens_T, temperature=0.7, with_entropy=with_entropy, chunk_rows=chunk_rows
    )
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    expected = token_log_probs(exact[0] @ exact[1].t(), tokens_T, temperature=0.7, with_entropy=with_entropy)
    torch.testing.assert_close(scored.log_probs_T.double(), expected.log_probs_T, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(loss_of(scored), inputs)
    for actual, wanted in zip(gradients, torch.autograd.grad(loss_of(expected), exact), strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=1e-5, rtol=1e-5)


def test_gradients_match_finite_differences() -> None:
    hidden_TD, weight_VD, tokens_T = example(torch.float64, rows=3)

    def score(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scored = linear_token_log_probs(hidden_TD, weight_VD, tokens_T, temperature=1.3, with_entropy=True)
        assert scored.entropy_T is not None
        return scored.log_probs_T, scored.entropy_T

    inputs = hidden_TD[:, :4].clone().requires_grad_(), weight_VD[:, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(score, inputs)


def test_bfloat16_is_the_head_in_bfloat16_and_the_softmax_in_float32() -> None:
    hidden_TD, weight_VD, tokens_T = example(torch.bfloat16)
    inputs = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    scored = linear_token_log_probs(*inputs, tokens_T, with_entropy=True, chunk_rows=16)
    plain = token_log_probs(torch.nn.functional.linear(*inputs), tokens_T, with_entropy=True)
    assert torch.equal(scored.log_probs_T, plain.log_probs_T)
    gradients = torch.autograd.grad(loss_of(scored), inputs)
    for actual, wanted in zip(gradients, torch.autograd.grad(loss_of(plain), inputs), strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, wanted, atol=3e-2, rtol=2e-2)


def test_autocast_casts_the_head_as_a_linear_layer_would() -> None:
    hidden_TD, weight_VD, tokens_T = example()
    hidden_TD.requires_grad_()
    weight_VD.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored = linear_token_log_probs(hidden_TD, weight_VD, tokens_T)
        plain = token_log_probs(torch.nn.functional.linear(hidden_TD, weight_VD), tokens_T)
    assert torch.equal(scored.log_probs_T, plain.log_probs_T)
    gradients = torch.autograd.grad(loss_of(scored), (hidden_TD, weight_VD))
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(frozen: str) -> None:
    hidden_TD, weight_VD, tokens_T = example()
    hidden_TD.requires_grad_(frozen != "hidden")
    weight_VD.requires_grad_(frozen != "weight")
    loss_of(linear_token_log_probs(hidden_TD, weight_VD, tokens_T)).backward()
    assert (hidden_TD.grad is None) == (frozen == "hidden")
    assert (weight_VD.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_log_prob_is_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    hidden_TD, weight_VD, tokens_T = example(dtype)
    together_T = linear_token_log_probs(hidden_TD, weight_VD, tokens_T).log_probs_T
    for rows in (1, 5, 16):
        apart = [
            linear_token_log_probs(hidden_TD[i : i + rows], weight_VD, tokens_T[i : i + rows]).log_probs_T
            for i in range(0, len(tokens_T), rows)
        ]
        assert torch.equal(torch.cat(apart), together_T)


def test_no_rows_give_zero_gradients() -> None:
    hidden_TD, weight_VD, tokens_T = example(rows=0)
    hidden_TD.requires_grad_()
    weight_VD.requires_grad_()
    linear_token_log_probs(hidden_TD, weight_VD, tokens_T).log_probs_T.sum().backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad.abs().max() == 0


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need hidden \[T, D\]"):
        linear_token_log_probs(torch.zeros(3, 2), torch.zeros(5, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="one token a row"):
        linear_token_log_probs(torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(2))

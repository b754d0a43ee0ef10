import functools
import math

import algorithm_reference as reference
import pytest
import torch

from miles.algorithms import TokenLogProbs, token_log_probs


def example(rows: int = 7, vocab: int = 13, scale: float = 4.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = scale * torch.randn(rows, vocab, generator=generator)
    return logits_TV, torch.randint(0, vocab, (rows,), generator=generator)


def gradient(logits_TV: torch.Tensor, scored: TokenLogProbs) -> torch.Tensor:
    """Of a weighted sum of log-probs and entropies."""
    weights_T = torch.linspace(-1, 2, len(scored.log_probs_T), dtype=scored.log_probs_T.dtype)
    loss = (weights_T * scored.log_probs_T).sum()
    if scored.entropy_T is not None:
        loss = loss + (weights_T.flip(0).cos() * scored.entropy_T).sum()
    (grad_TV,) = torch.autograd.grad(loss, logits_TV)
    return grad_TV


def test_by_hand() -> None:
    # softmax of (0, ln 3): 1/4, 3/4.
    logits_TV = torch.tensor([[0.0, math.log(3)]] * 2)
    scored = token_log_probs(logits_TV, torch.tensor([0, 1]), with_entropy=True)
    assert scored.log_probs_T.tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    assert scored.entropy_T is not None
    assert scored.entropy_T[0].item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 3, None])
def test_values_and_gradients_match_float64(temperature: float, dtype: torch.dtype, chunk_rows: int | None) -> None:
    logits_TV, tokens_T = example(rows=9, vocab=101)
    logits_TV = logits_TV.to(dtype).requires_grad_()
    scored = token_log_probs(logits_TV, tokens_T, temperature=temperature, with_entropy=True, chunk_rows=chunk_rows)
    exact_TV = logits_TV.detach().double().requires_grad_()
    expected = TokenLogProbs(*reference.log_prob_and_entropy(exact_TV, tokens_T, temperature))
    assert scored.log_probs_T.dtype == torch.float32
    torch.testing.assert_close(scored.log_probs_T.double(), expected.log_probs_T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.entropy_T.double(), expected.entropy_T, atol=1e-5, rtol=1e-5)
    grad_TV = gradient(logits_TV, scored)
    assert grad_TV.dtype == dtype
    # A bfloat16 gradient is the float32 one, rounded.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(grad_TV.double(), gradient(exact_TV, expected), atol=1e-5, rtol=tolerance)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_row_scored_at_several_tokens_equals_rows_of_one_token_each(with_entropy: bool) -> None:
    logits_TV, _ = example(rows=5, vocab=11)
    tokens_TM = torch.tensor([[0, 3, 3], [1, 1, 1], [10, 0, 10], [4, 5, 6], [2, 0, 9]])
    together_TV, apart_TV = (logits_TV.clone().requires_grad_() for _ in range(2))
    together = token_log_probs(together_TV, tokens_TM, temperature=0.7, with_entropy=with_entropy, chunk_rows=2)
    apart = token_log_probs(
        apart_TV.repeat_interleave(3, 0), tokens_TM.flatten(), temperature=0.7, with_entropy=with_entropy
    )
    assert together.log_probs_T.flatten().tolist() == apart.log_probs_T.tolist()
    weights_TM = torch.linspace(-1, 1, 15).view(5, 3)
    losses = [(weights_TM * together.log_probs_T).sum(), (weights_TM.flatten() * apart.log_probs_T).sum()]
    if together.entropy_T is not None and apart.entropy_T is not None:
        losses[0] = losses[0] + (together.entropy_T[:, None] * weights_TM).sum()
        losses[1] = losses[1] + (apart.entropy_T * weights_TM.flatten()).sum()
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (together_TV, apart_TV), strict=True)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients_match_finite_differences(with_entropy: bool) -> None:
    logits_TV, tokens_T = example(rows=3, vocab=5, scale=1.0)

    def score(x_TV: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scored = token_log_probs(x_TV, tokens_T, temperature=0.8, with_entropy=with_entropy, chunk_rows=2)
        return (scored.log_probs_T,) if scored.entropy_T is None else (scored.log_probs_T, scored.entropy_T)

    assert torch.autograd.gradcheck(score, logits_TV.double().requires_grad_())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_rows_log_prob_is_the_same_bits_in_any_company(threads: int, dtype: torch.dtype, temperature: float) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits_TV, tokens_T = example(rows=23, vocab=5003)
        logits_TV = logits_TV.to(dtype)
        score = functools.partial(token_log_probs, temperature=temperature)
        together_T = score(logits_TV, tokens_T).log_probs_T
        scaled_TV = logits_TV.float() if temperature == 1 else logits_TV.float() / temperature
        plain_T = torch.log_softmax(scaled_TV, -1).gather(-1, tokens_T[:, None]).squeeze(-1)
        assert torch.equal(together_T, plain_T)
        for rows in (1, 2, 5):
            assert torch.equal(score(logits_TV, tokens_T, chunk_rows=rows).log_probs_T, together_T)
            apart = [score(logits_TV[i : i + rows], tokens_T[i : i + rows]).log_probs_T for i in range(0, 23, rows)]
            assert torch.equal(torch.cat(apart), together_T)
    finally:
        torch.set_num_threads(before)


def test_overwriting_gives_the_same_gradient_in_the_memory_of_the_logits() -> None:
    logits_TV, tokens_T = example()
    kept_TV = logits_TV.clone().requires_grad_()
    expected_TV = gradient(kept_TV, token_log_probs(kept_TV, tokens_T, temperature=0.5, with_entropy=True))
    leaf_TV = logits_TV.clone().requires_grad_()
    spent_TV = leaf_TV * 1.0
    scored = token_log_probs(
        spent_TV, tokens_T, temperature=0.5, with_entropy=True, chunk_rows=2, overwrite_logits=True
    )
    weights_T = torch.linspace(-1, 2, 7)
    ((weights_T * scored.log_probs_T).sum() + (weights_T.flip(0).cos() * scored.entropy_T).sum()).backward()
    torch.testing.assert_close(leaf_TV.grad, expected_TV)
    torch.testing.assert_close(spent_TV.detach(), expected_TV)


def test_an_observed_entropy_has_no_gradient() -> None:
    logits_TV, tokens_T = example()
    logits_TV.requires_grad_()
    observed = token_log_probs(logits_TV, tokens_T, with_entropy=True, entropy_requires_grad=False)
    assert observed.entropy_T is not None
    assert not observed.entropy_T.requires_grad
    without = token_log_probs(logits_TV, tokens_T)
    assert torch.equal(
        torch.autograd.grad(observed.log_probs_T.sum(), logits_TV)[0],
        torch.autograd.grad(without.log_probs_T.sum(), logits_TV)[0],
    )


def test_an_entropy_alone_has_a_gradient() -> None:
    logits_TV, tokens_T = example()
    logits_TV.requires_grad_()
    scored = token_log_probs(logits_TV, tokens_T, with_entropy=True)
    exact_TV = logits_TV.detach().double().requires_grad_()
    expected_TV = torch.autograd.grad(reference.log_prob_and_entropy(exact_TV, tokens_T)[1].sum(), exact_TV)[0]
    actual_TV = torch.autograd.grad(scored.entropy_T.sum(), logits_TV)[0]
    torch.testing.assert_close(actual_TV.double(), expected_TV, atol=1e-5, rtol=1e-5)


def test_forbidden_tokens_have_no_probability_and_no_gradient() -> None:
    logits_TV, tokens_T = example()
    tokens_T = tokens_T.clamp_max(11)
    logits_TV[:, 12] = -torch.inf
    logits_TV.requires_grad_()
    scored = token_log_probs(logits_TV, tokens_T, with_entropy=True)
    fewer_TV = logits_TV.detach()[:, :12].requires_grad_()
    fewer = token_log_probs(fewer_TV, tokens_T, with_entropy=True)
    torch.testing.assert_close(scored.entropy_T, fewer.entropy_T)
    grad_TV = gradient(logits_TV, scored)
    torch.testing.assert_close(grad_TV[:, :12], gradient(fewer_TV, fewer))
    assert grad_TV[:, 12].abs().max() == 0


@pytest.mark.parametrize("upstream", [0.5, 1.5, -3.0, 1e6])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forbidden_tokens_have_no_gradient_whatever_the_upstream_one(
    dtype: torch.dtype, temperature: float, upstream: float
) -> None:
    logits_TV = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]], dtype=dtype, requires_grad=True)
    scored = token_log_probs(logits_TV, torch.tensor([1]), with_entropy=True, temperature=temperature)
    (upstream * scored.entropy_T.sum()).backward()
    fewer_TV = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    log_p_TV = (fewer_TV / temperature).log_softmax(-1)
    (-upstream * (log_p_TV.exp() * log_p_TV).sum()).backward()
    assert logits_TV.grad[0, 2] == 0
    actual = logits_TV.grad[0, [0, 1, 3]].double()
    torch.testing.assert_close(actual, fewer_TV.grad[0], rtol=1e-5 if dtype != torch.bfloat16 else 2**-7, atol=1e-6)


def test_an_impossible_token_has_minus_infinity_and_a_finite_gradient() -> None:
    logits_TV = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    scored = token_log_probs(logits_TV, torch.tensor([1]), with_entropy=True)
    assert scored.log_probs_T.tolist() == [-torch.inf]
    scored.log_probs_T.sum().backward()
    assert logits_TV.grad.isfinite().all()


def test_extreme_logits_stay_finite() -> None:
    logits_TV = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]], requires_grad=True)
    scored = token_log_probs(logits_TV, torch.tensor([0, 1]), with_entropy=True, temperature=0.1)
    assert scored.log_probs_T.tolist() == [0.0, 0.0]
    assert scored.entropy_T.tolist() == [0.0, 0.0]
    assert gradient(logits_TV, scored).isfinite().all()


def test_no_rows_give_no_log_probs_and_an_empty_gradient() -> None:
    logits_TV = torch.zeros(0, 5, requires_grad=True)
    scored = token_log_probs(logits_TV, torch.zeros(0, dtype=torch.int32), with_entropy=True)
    assert scored.log_probs_T.shape == scored.entropy_T.shape == (0,)
    scored.log_probs_T.sum().backward()
    assert logits_TV.grad is not None


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperatures_that_are_not_positive_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_log_probs(torch.zeros(1, 2), torch.zeros(1), temperature=temperature)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need logits \[T, V\]"):
        token_log_probs(torch.zeros(3, 2), torch.zeros(2))

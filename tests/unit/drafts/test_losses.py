from __future__ import annotations

import math

import pytest
import torch

from miles.drafts.losses import chain_length, cross_entropy, log_probs_at, loss_at, top_k_divergence
from miles.drafts.packed_batch import Targets
from miles.drafts.vocabulary import DraftVocabulary

WHOLE = DraftVocabulary(torch.arange(6), 6)


def targets_of(probs_NV: torch.Tensor, top: int) -> Targets:
    top_NK, tokens_NK = probs_NV.topk(top)
    return Targets(tokens_NK, top_NK.log(), tokens_NK[:, 0])


def random_distributions(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def test_divergence_with_all_tokens_is_that_of_the_distributions():
    policy, draft = random_distributions(50, 0), random_distributions(50, 1)
    expected = (policy * (policy.log() - draft.log())).sum(-1)
    torch.testing.assert_close(top_k_divergence(draft.log(), targets_of(policy, 6), WHOLE), expected)


def test_a_draft_with_the_logits_of_the_policy_has_nothing_to_learn_at_any_temperature() -> None:
    logits = random_distributions(20, 4).log()
    sampled_at = targets_of((logits / 0.6).softmax(-1), 6)
    assert loss_at("kl", 0.6)(logits, sampled_at, WHOLE).abs().max() < 1e-6
    assert loss_at("kl", 1.0)(logits, sampled_at, WHOLE).min() > 1e-3


def test_other_tokens_count_as_one():
    policy, draft = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04, 0.0]]), torch.tensor([[0.2, 0.3, 0.1, 0.1, 0.1, 0.2]])
    expected = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.3) + 0.2 * math.log(0.2 / 0.5)
    found = top_k_divergence(draft.log(), targets_of(policy, 2), WHOLE)
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_divergence_is_zero_where_the_distributions_are_equal_and_pulls_towards_the_policy():
    policy = random_distributions(20, 2)
    assert top_k_divergence(policy.log() + 3, targets_of(policy, 3), WHOLE).abs().max() < 1e-6
    logits = torch.zeros(20, 6, requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(top_k_divergence(logits, targets_of(policy, 3), WHOLE).sum(), logits)
        logits = (logits - gradient).detach().requires_grad_()
    top = policy.topk(3).indices
    torch.testing.assert_close(logits.softmax(-1).gather(-1, top), policy.gather(-1, top), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_some_tokens_have_the_gradient_of_all(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(20, 6, generator=generator) * 4).to(dtype)
    ids = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(20)])
    weights = torch.randn(20, 3, generator=generator)
    one, two = (logits.clone().requires_grad_() for _ in range(2))
    found, expected = log_probs_at(one, ids), two.float().log_softmax(-1).gather(-1, ids)
    assert found.equal(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert one.grad is not None
    assert one.grad.dtype == dtype
    torch.testing.assert_close(one.grad, two.grad)


def test_a_certain_policy_and_a_certain_draft_give_finite_gradients():
    logits = torch.tensor([[200.0, 0, 0, 0, 0, 0], [0, 200.0, 0, 0, 0, 0]], requires_grad=True)
    certain = Targets(torch.tensor([[0], [0]]), torch.zeros(2, 1), torch.tensor([0, 0]))
    losses = top_k_divergence(logits, certain, WHOLE)
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(0, abs=1e-5)
    assert losses[1].item() == pytest.approx(200)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_part_of_the_vocabulary_learns_the_policy_over_what_it_has():
    part = DraftVocabulary(torch.tensor([1, 2, 4]), 6)
    policy = torch.tensor([[0.1, 0.5, 0.2, 0.1, 0.1, 0.0], [0.6, 0.2, 0.1, 0.05, 0.03, 0.02]])
    draft = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    found = top_k_divergence(draft.log(), targets_of(policy, 6), part)
    over = torch.tensor([0.5, 0.2, 0.1]) / 0.8
    torch.testing.assert_close(found[0], (over * (over.log() - draft[0].log())).sum())
    assert found[1] == 0  # its likeliest token cannot be drafted


def test_cross_entropy_is_with_the_sampled_token_where_the_draft_has_it():
    part = DraftVocabulary(torch.tensor([1, 4]), 6)
    sampled = Targets(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.tensor([4, 3]))
    found = cross_entropy(torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log(), sampled, part)
    torch.testing.assert_close(found, torch.tensor([-math.log(0.75), 0.0]))


def test_a_chain_ends_at_the_first_draft_that_is_wrong():
    hits = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    assert chain_length(hits).tolist() == [4, 2, 1, 3]

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from miles.algorithms import LossBatch, LossConfig, Packing, TruncatedImportanceSampling, rl_loss
from miles.algorithms.user_functions import UserCorrection, UserFunctionError, UserReducer
from miles.algorithms.user_loss import UserLoss
from miles.extensions.arguments import Args

PACKING = Packing((3, 2, 1))
MASK_T = torch.tensor([1, 0, 1, 1, 1, 1])
ARGS = Args(tis_clip=1.1, tis_clip_low=0.0)


def batch() -> LossBatch:
    generator = torch.Generator().manual_seed(0)
    train_T, rollout_T = (-torch.rand(6, generator=generator) for _ in range(2))
    return LossBatch(
        packing=PACKING,
        mask_T=MASK_T,
        advantages_T=PACKING.expand(torch.tensor([1.0, -0.5, 2.0])),
        train_log_probs_T=train_T,
        rollout_log_probs_T=rollout_T,
        denominator=3.0,
    )


def new_log_probs() -> torch.Tensor:
    return (-torch.rand(6, generator=torch.Generator().manual_seed(1))).requires_grad_()


def truncated(
    args: Any, *, pg_loss: Any, train_log_probs: Any, rollout_log_probs: Any, loss_masks: Any, **kwargs: Any
) -> Any:
    """As recipes write it."""
    ratio = torch.exp(torch.cat(train_log_probs, dim=0) - torch.cat(rollout_log_probs, dim=0))
    weights = torch.clamp(ratio, min=args.tis_clip_low, max=args.tis_clip)
    return pg_loss * weights, loss_masks, {"tis": ratio, "tis_clipfrac": (weights != ratio).float()}


def test_a_users_correction_does_what_the_built_in_one_does() -> None:
    outputs, gradients = [], []
    for config in (
        LossConfig(correction=TruncatedImportanceSampling(tis_clip=1.1)),
        LossConfig(user_correction=UserCorrection(truncated, ARGS)),
    ):
        log_probs_T = new_log_probs()
        outputs.append(rl_loss(config, batch(), log_probs_T))
        outputs[-1].loss.backward()
        gradients.append(log_probs_T.grad)
    built_in, own = outputs
    torch.testing.assert_close(own.loss, built_in.loss)
    torch.testing.assert_close(gradients[1], gradients[0])
    for name in ("train/tis", "train/tis_clipfrac"):
        torch.testing.assert_close(own.metrics[name].total, built_in.metrics[name].total)


def test_tokens_whose_mask_it_removes_leave_the_numerator_alone() -> None:
    def rejects(args: Any, *, pg_loss: Any, loss_masks: Any, **kwargs: Any) -> Any:
        return pg_loss, [torch.zeros_like(loss_masks[0]), *loss_masks[1:]], {}

    config = LossConfig(user_correction=UserCorrection(rejects, ARGS))
    log_probs_T = new_log_probs()
    rl_loss(config, batch(), log_probs_T).loss.backward()
    plain_T = new_log_probs()
    rl_loss(LossConfig(), batch(), plain_T).loss.backward()
    assert log_probs_T.grad is not None
    assert plain_T.grad is not None
    assert log_probs_T.grad[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(log_probs_T.grad[3:], plain_T.grad[3:])


def test_a_users_reducer_sums_the_policy_loss() -> None:
    def by_constant(total_lengths: Any, response_lengths: Any, loss_masks: Any, per_token: bool) -> Any:
        assert not per_token
        return lambda x: sum(
            ((part * mask).sum() / 10 for part, mask in zip(x.split(response_lengths), loss_masks, strict=True)),
            torch.zeros(()),
        )

    own = rl_loss(LossConfig(user_reducer=UserReducer(by_constant)), batch(), new_log_probs())
    expected = rl_loss(LossConfig(policy_loss="dr_grpo", loss_length=10), batch(), new_log_probs())
    torch.testing.assert_close(own.loss, expected.loss)


def test_a_users_loss_is_divided_as_the_policys_is() -> None:
    def reinforce(args: Any, batch: dict[str, Any], log_probs: Any, sum_of_sample_mean: Callable[..., Any]) -> Any:
        loss = sum_of_sample_mean(-log_probs * torch.cat(batch["advantages"]))
        moved = sum_of_sample_mean((log_probs - torch.cat(batch["log_probs"])).abs())
        assert [len(mask) for mask in batch["loss_masks"]] == batch["response_lengths"] == [3, 2, 1]
        return loss, {"moved": moved.detach()}

    log_probs_T = new_log_probs()
    output = UserLoss(reinforce, ARGS)(batch(), log_probs_T, None, per_token=False)
    output.loss.backward()
    assert log_probs_T.grad is not None
    torch.testing.assert_close(log_probs_T.grad, -torch.tensor([0.5, 0, 0.5, -0.25, -0.25, 2.0]) / 3)
    assert set(output.metrics) == {"train/loss", "train/moved"}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda x: x.sum(), r"return \(loss, metrics\)"),
        (lambda x: (x, {}), "gave Tensor; a tensor with one number is expected"),
        (lambda x: (x.sum(), {"a": 1.0}), "the metric a of custom_loss_function_path gave float"),
        (lambda x: (x.sum().detach(), {}), "its loss has no gradient"),
    ],
)
def test_what_a_loss_may_not_return(returned: Callable[[Any], Any], words: str) -> None:
    loss = UserLoss(lambda args, batch, log_probs, reduce: returned(log_probs), ARGS)
    with pytest.raises(UserFunctionError, match=words):
        loss(batch(), new_log_probs(), None, per_token=False)


def test_a_correction_of_another_length_is_refused() -> None:
    config = LossConfig(user_correction=UserCorrection(lambda args, pg_loss, **_: (pg_loss[1:], [MASK_T], {}), ARGS))
    with pytest.raises(UserFunctionError, match=r"pg_loss has shape \(5,\); there are 6 tokens"):
        rl_loss(config, batch(), new_log_probs())

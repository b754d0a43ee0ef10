"""Functions of a recipe for the sorting task, as a user of slime writes them: every extension point in one run."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import torch
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Answer, be asked once more, and answer again; what is asked is not trained on."""
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    asked = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    sample.tokens = list(asked)
    answers = []
    for turn in range(args.turns):
        payload = {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True}
        output = await post(url, payload)
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample
        new = output["meta_info"]["output_token_logprobs"]
        sample.append_response_tokens(
            args, tokens=[item[1] for item in new], log_probs=[item[0] for item in new], meta_info=output["meta_info"]
        )
        answers.append(output["text"].replace("<end>", ""))
        if turn + 1 < args.turns:
            sample.append_response_tokens(args, tokens=asked, trainable=False)
    sample.response = " ".join(answers)
    sample.answers = answers  # type: ignore[attr-defined]
    return sample


async def reward_func(args: Any, sample: Sample, **kwargs: Any) -> dict[str, Any]:
    """The share of right answers."""
    answers = getattr(sample, "answers")  # noqa: B009  (what `generate` has set)
    right = [answer == sample.label for answer in answers]
    return {"score": sum(right) / len(right), "pred": answers[-1]}


def has_spread(args: Any, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keep groups with different rewards."""
    rewards = torch.tensor([sample.get_reward_value(args) for sample in samples])
    return DynamicFilterOutput(keep=rewards.std() > 1e-6, reason="no_spread")  # type: ignore[arg-type]


def only_full_answers(args: Any, groups: list[list[Sample]]) -> None:
    """Take truncated samples out."""
    for sample in (sample for group in groups for sample in group):
        sample.remove_sample = sample.status is Sample.Status.TRUNCATED


def normalised(args: Any, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """Subtract the mean of the group."""
    raw = [sample.get_reward_value(args) for sample in samples]
    groups = collections.defaultdict(list)
    for sample, reward in zip(samples, raw, strict=True):
        groups[sample.group_index].append(reward)
    means = {group: sum(rewards) / len(rewards) for group, rewards in groups.items()}
    return raw, [reward - means[sample.group_index] for sample, reward in zip(samples, raw, strict=True)]


def corrected(
    args: Any, *, pg_loss: Any, train_log_probs: Any, rollout_log_probs: Any, loss_masks: Any, **kwargs: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Truncated importance sampling."""
    ratio = torch.exp(torch.cat(train_log_probs) - torch.cat(rollout_log_probs))
    return pg_loss * ratio.clamp(max=args.tis_clip), loss_masks, {"own_ratio": ratio}


def reinforce(
    args: Any, batch: dict[str, Any], log_probs: torch.Tensor, sum_of_sample_mean: Callable[[Any], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The plain policy gradient."""
    loss = sum_of_sample_mean(-log_probs * torch.cat(batch["advantages"]))
    return loss, {"own_loss": loss.detach().clone()}


def by_tokens(
    total_lengths: Sequence[int], response_lengths: Sequence[int], loss_masks: Any, per_token: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The sum over tokens."""
    return lambda values: (values * torch.cat(loss_masks)).sum()

"""Generate functions as users of slime and miles write them."""

from __future__ import annotations

import asyncio
from typing import Any

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample

TOOL = " TOOL "


async def two_turns(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """A turn of the model, the answer of a tool, and another turn; with text, as Search-R1's recipe has it."""
    assert not args.partial_rollout
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    mask: list[int] = []
    log_probs: list[float] = []
    params = {**sampling_params, "max_new_tokens": 5, "stop": ["</search>"]}
    for turn in range(2):
        payload = {"input_ids": prompt_ids + ids, "sampling_params": params, "return_logprob": True}
        output = await post(url, payload)
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample
        new = output["meta_info"]["output_token_logprobs"]
        ids += [item[1] for item in new]
        log_probs += [item[0] for item in new]
        mask += [1] * len(new)
        if turn == 0:
            observed = state.tokenizer(TOOL, add_special_tokens=False)["input_ids"]
            ids += observed
            log_probs += [0.0] * len(observed)
            mask += [0] * len(observed)
    sample.tokens = prompt_ids + ids
    sample.response_length = len(ids)
    sample.response = state.tokenizer.decode(ids)
    sample.loss_mask = mask
    sample.rollout_log_probs = log_probs
    sample.metadata["turns"] = 2
    sample.tool_calls = 1
    sample.status = Sample.Status.COMPLETED
    return sample


async def with_helpers(args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False) -> Sample:
    """The same with the sample's own methods, and a reward of its own."""
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    sample.tokens = state.tokenizer.encode(sample.prompt, add_special_tokens=False)
    for turn in range(2):
        params = {**sampling_params, "max_new_tokens": 4}
        output = await post(url, {"input_ids": sample.tokens, "sampling_params": params, "return_logprob": True})
        new = output["meta_info"]["output_token_logprobs"]
        sample.append_response_tokens(
            args,
            tokens=[item[1] for item in new],
            log_probs=[item[0] for item in new],
            meta_info=output["meta_info"],
            text=output["text"],
        )
        if turn == 0:
            observed = state.tokenizer.encode(TOOL, add_special_tokens=False)
            sample.append_response_tokens(args, tokens=observed, trainable=False, text=TOOL)
    assert sample.index is not None
    sample.reward = float(sample.index % 2) + 10.0 * evaluation
    return sample


async def raises(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """The tool is broken."""
    raise KeyError(f"no tool for {sample.label}")


async def cold(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Trains on tokens of another temperature than the job's."""
    return await two_turns(args, sample, {**sampling_params, "temperature": 0.5})


async def gives_up(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """The environment of the first sample of each group fails."""
    assert sample.index is not None
    if sample.index % 2 == 0:
        sample.status = Sample.Status.ABORTED
        sample.metadata["abort_reason"] = "the environment is gone"
        return sample
    return await two_turns(args, sample, sampling_params)


async def waits(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Waits for a tool that never answers."""
    await two_turns(args, sample, sampling_params)
    await asyncio.Event().wait()
    return sample


async def several(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> list[Sample]:
    """Returns two samples."""
    return [sample, sample]


async def reward_func(args: Any, sample: Sample, **kwargs: Any) -> float:
    """A reward in the form of slime's recipes."""
    assert isinstance(sample, Sample)
    assert isinstance(sample.prompt, str)
    sample.metadata["turns_seen"] = sample.metadata.get("turns")
    return float(getattr(sample, "tool_calls", 0)) + args.rollout_temperature * (sample.response != "")


async def group_reward_func(args: Any, samples: list[Sample], **kwargs: Any) -> list[dict[str, Any]]:
    """A reward of a group with parts that are no numbers."""
    return [{"score": float(i), "acc": i > 0, "pred": f"answer {i}"} for i in range(len(samples))]


def blocking_reward(args: Any, sample: Sample) -> float:
    """A reward that is not asynchronous."""
    return float(sample.label["answer"])

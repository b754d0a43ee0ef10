"""Functions of a recipe for models that search: they import what recipes import."""

from __future__ import annotations

from typing import Any

from miles.rollout.sglang_rollout import GenerateState
from miles.utils.http_utils import post
from miles.utils.types import Sample


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Two turns, with what was found between them."""
    tokenizer = GenerateState(args).tokenizer
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    sample.tokens = tokenizer.encode(sample.prompt, add_special_tokens=False)
    for turn in range(2):
        body = {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True}
        answer = await post(url, body)
        new = answer["meta_info"]["output_token_logprobs"]
        sample.append_response_tokens(
            args, tokens=[entry[1] for entry in new], log_probs=[entry[0] for entry in new],
            meta_info=answer["meta_info"],
        )  # fmt: skip
        if turn == 0 and answer["meta_info"]["finish_reason"]["type"] == "stop":
            found = tokenizer.encode(" found ", add_special_tokens=False)
            sample.append_response_tokens(args, tokens=found, trainable=False)
    return sample


async def reward_func(args: Any, sample: Sample, **kwargs: Any) -> float:
    """Whether the answer is in the response."""
    return float(str(sample.label) in sample.response)

"""What generate functions of users need: the tokenizer, the engine's address, and generation in one turn."""

from __future__ import annotations

import functools
from typing import Any

from miles.utils.http_utils import post
from miles.utils.processing_utils import load_processor, load_tokenizer
from miles.utils.types import Sample


class GenerateState:
    """The tokenizer and the sampling parameters of a job. Cheap to build: the tokenizer is loaded once."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.tokenizer = _tokenizer(args.hf_checkpoint, getattr(args, "chat_template_path", None))
        self.processor = load_processor(args.hf_checkpoint)
        self.sampling_params: dict[str, Any] = {
            "temperature": args.rollout_temperature,
            "top_p": args.rollout_top_p,
            "top_k": args.rollout_top_k,
            "max_new_tokens": args.rollout_max_response_len,
            "stop": args.rollout_stop,
            "stop_token_ids": args.rollout_stop_token_ids,
            "skip_special_tokens": args.rollout_skip_special_tokens,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
        }
        self.aborted = False


@functools.cache
def _tokenizer(hf_checkpoint: str, chat_template_path: str | None) -> Any:
    return load_tokenizer(hf_checkpoint, chat_template_path)


def get_model_url(args: Any, model_name: str, endpoint: str = "/generate") -> str:
    """Return the engine's address. There is one model, so every name stands for it."""
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}{endpoint}"


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Generate a response in one request, behind what the sample already has."""
    if not sample.tokens:
        sample.tokens = list(GenerateState(args).tokenizer.encode(sample.prompt, add_special_tokens=False))
    left = sampling_params["max_new_tokens"] - sample.response_length
    if left <= 0:
        sample.status = Sample.Status.TRUNCATED
        return sample
    payload = {
        "input_ids": sample.tokens,
        "sampling_params": {**sampling_params, "max_new_tokens": left},
        "return_logprob": True,
    }
    answer = await post(get_model_url(args, "default"), payload)
    new = answer["meta_info"]["output_token_logprobs"]
    sample.append_response_tokens(
        args,
        tokens=[entry[1] for entry in new],
        log_probs=[entry[0] for entry in new],
        meta_info=answer["meta_info"],
        text=answer["text"],
    )
    return sample

"""The torch engine on a GPU."""

from __future__ import annotations

import asyncio
import pathlib

import pytest
import torch
from torch_engine_models import prompt_of, reference_log_probs, respond, running_engine, save_checkpoint, weights_of

from miles.services.rollout.engines.base import PauseMode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
async def test_log_probs_equal_a_plain_forward_pass(tmp_path: pathlib.Path, family: str) -> None:
    model = save_checkpoint(tmp_path, family)
    prompts = [prompt_of(5 + 13 * i, i) for i in range(8)]
    async with running_engine(tmp_path, weights_of(model), device="cuda") as engine:
        responses = await asyncio.gather(
            *(respond(engine, prompt, request_id=str(i), seed=i) for i, prompt in enumerate(prompts))
        )
    for prompt, response in zip(prompts, responses, strict=True):
        expected = reference_log_probs(model, prompt, response.tokens)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-4, rtol=0)


async def test_a_bfloat16_response_is_the_same_alone_among_others_and_after_a_retraction(
    tmp_path: pathlib.Path,
) -> None:
    tensors = weights_of(save_checkpoint(tmp_path, "qwen3"), torch.bfloat16)
    sampling = {"seed": 3, "max_new_tokens": 300, "min_new_tokens": 300}
    async with running_engine(tmp_path, tensors, device="cuda", dtype="bfloat16") as engine:
        alone = await respond(engine, prompt_of(40), **sampling)
        others = [
            asyncio.create_task(respond(engine, prompt_of(5 + 3 * i, i), request_id=f"o{i}", max_new_tokens=100))
            for i in range(20)
        ]
        among = asyncio.create_task(respond(engine, prompt_of(40), request_id="among", **sampling))
        await asyncio.sleep(0.3)
        await engine.pause(PauseMode.RETRACT)
        await engine.resume()
        response = await among
        await asyncio.gather(*others)
    assert response.tokens == alone.tokens
    assert response.log_probs == alone.log_probs

"""The torch engine on a GPU."""

from __future__ import annotations

import asyncio
import pathlib

import pytest
import torch
from torch_engine_models import (
    Response,
    prompt_of,
    reference_log_probs,
    respond,
    running_engine,
    save_checkpoint,
    weights_of,
)

from miles.config.speculation import DraftKind, Speculation
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


async def test_drafts_change_no_bfloat16_response(tmp_path: pathlib.Path) -> None:
    tensors = weights_of(save_checkpoint(tmp_path, "qwen3"), torch.bfloat16)
    speculation = Speculation(DraftKind.NGRAM, num_steps=3, num_draft_tokens=4, adaptive=False)
    options = {"device": "cuda", "dtype": "bfloat16", "speculation": speculation}
    sampling = {"max_new_tokens": 200, "min_new_tokens": 200}
    async with running_engine(tmp_path, tensors, **options) as engine:

        async def run(name: str, earlier: list[list[int]]) -> list[Response]:
            return await asyncio.gather(
                *(
                    respond(engine, prompt_of(30), request_id=f"{name}{i}", seed=i, earlier=earlier, **sampling)
                    for i in range(6)
                )
            )

        first = await run("first", [])
        again = await run("again", [response.tokens for response in first[:3]])
    assert [(r.tokens, r.log_probs) for r in again] == [(r.tokens, r.log_probs) for r in first]
    accepted = [r.result.speculative.accepted_draft_tokens for r in again if r.result.speculative is not None]
    assert min(accepted[:3]) > 50


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

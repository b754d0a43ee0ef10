"""A response depends on the weights, its prompt and its seed, and on nothing else: bit for bit."""

from __future__ import annotations

import asyncio
import pathlib

import pytest
import torch
from torch_engine_models import Response, prompt_of, respond, running_engine, save_checkpoint, weights_of

from miles.services.rollout.engines.base import GenerationRequest, PauseMode, SamplingParams

pytestmark = pytest.mark.engine

CASES = [("llama", "float32"), ("llama", "bfloat16"), ("qwen3_moe", "float32"), ("qwen3_moe", "bfloat16")]


def weights(folder: pathlib.Path, family: str, dtype: str) -> dict[str, torch.Tensor]:
    return weights_of(save_checkpoint(folder, family), getattr(torch, dtype))


def same(left: Response, right: Response) -> bool:
    """Tokens and log-probs alike, bit for bit."""
    return left.tokens == right.tokens and left.log_probs == right.log_probs


@pytest.mark.parametrize(("family", "dtype"), CASES)
async def test_a_response_is_the_same_alone_and_among_others(tmp_path: pathlib.Path, family: str, dtype: str) -> None:
    tensors = weights(tmp_path, family, dtype)
    prompt = prompt_of(37)
    async with running_engine(tmp_path, tensors, dtype=dtype, max_running_requests=24) as engine:
        alone = await respond(engine, prompt, seed=5, max_new_tokens=80, min_new_tokens=80)
        others = [
            asyncio.create_task(
                respond(engine, prompt_of(3 + 5 * i, i), request_id=f"o{i}", seed=i, max_new_tokens=20 + 9 * i)
            )
            for i in range(14)
        ]
        await asyncio.sleep(0.05)
        late = await respond(engine, prompt, request_id="late", seed=5, max_new_tokens=80, min_new_tokens=80)
        await asyncio.gather(*others)
        group = await asyncio.gather(
            *(
                respond(engine, prompt, request_id=f"g{i}", seed=i, max_new_tokens=80, min_new_tokens=80)
                for i in range(30)
            )
        )
    assert same(alone, late)
    assert same(alone, group[5])
    assert group[5].result.cached_prompt_tokens == 37
    assert not same(alone, group[4])


@pytest.mark.parametrize(("family", "dtype"), CASES)
async def test_a_retracted_response_goes_on_as_if_nothing_had_happened(
    tmp_path: pathlib.Path, family: str, dtype: str
) -> None:
    tensors = weights(tmp_path, family, dtype)
    requests = [(prompt_of(9 + 20 * i, i), i) for i in range(4)]
    async with running_engine(tmp_path, tensors, dtype=dtype) as engine:

        async def run(prefix: str) -> list[Response]:
            return await asyncio.gather(
                *(
                    respond(
                        engine, p, request_id=f"{prefix}{i}", seed=i, routed=True, max_new_tokens=90, min_new_tokens=90
                    )
                    for p, i in requests
                )
            )

        undisturbed = await run("a")
        disturbed = asyncio.create_task(run("b"))
        for _ in range(3):
            await asyncio.sleep(0.04)
            await engine.pause(PauseMode.RETRACT)
            assert engine.stats().running_requests == 0
            await engine.resume()
        assert not disturbed.done()
        for left, right in zip(undisturbed, await disturbed, strict=True):
            assert same(left, right)
            if left.result.routed_experts is not None and right.result.routed_experts is not None:
                assert left.result.routed_experts.tolist() == right.result.routed_experts.tolist()


@pytest.mark.parametrize(("family", "dtype"), CASES)
async def test_a_resumed_response_equals_an_uninterrupted_one(tmp_path: pathlib.Path, family: str, dtype: str) -> None:
    tensors = weights(tmp_path, family, dtype)
    prompt = prompt_of(30)
    sampling = {"seed": 11, "max_new_tokens": 50, "min_new_tokens": 50, "temperature": 0.9}
    async with running_engine(tmp_path, tensors, dtype=dtype) as engine:
        whole = await respond(engine, prompt, routed=True, **sampling)
        for cut in (1, 20, 49):
            rest = await respond(engine, prompt, resumed=whole.tokens[:cut], routed=True, **sampling)
            assert rest.tokens == whole.tokens[cut:]
            assert rest.log_probs == whole.log_probs[cut:]
            assert rest.result.weight_versions[0].end == 50 - cut
            if family == "qwen3_moe":
                assert rest.result.routed_experts is not None
                assert whole.result.routed_experts is not None
                assert rest.result.routed_experts.tolist() == whole.result.routed_experts.tolist()


async def test_responses_do_not_depend_on_the_number_of_slots_or_the_prefill_size(tmp_path: pathlib.Path) -> None:
    tensors = weights(tmp_path, "qwen3", "bfloat16")
    prompts = [prompt_of(5 + 11 * (i // 3), i // 3) for i in range(12)]
    runs = []
    for slots, prefill in ((1, 512), (3, 16), (12, 7)):
        async with running_engine(
            tmp_path, tensors, dtype="bfloat16", max_running_requests=slots, max_prefill_tokens=prefill
        ) as engine:
            runs.append(
                await asyncio.gather(
                    *(respond(engine, p, request_id=str(i), seed=i, max_new_tokens=30) for i, p in enumerate(prompts))
                )
            )
    for other in runs[1:]:
        assert all(same(left, right) for left, right in zip(runs[0], other, strict=True))


async def test_a_large_gap_of_aborted_neighbours_changes_nothing(tmp_path: pathlib.Path) -> None:
    tensors = weights(tmp_path, "qwen2", "float32")
    prompt = prompt_of(15)
    async with running_engine(tmp_path, tensors) as engine:
        alone = await respond(engine, prompt, seed=3, max_new_tokens=70, min_new_tokens=70)

        async def leave_early(index: int) -> None:
            request = GenerationRequest(
                f"x{index}", prompt_of(10, index), SamplingParams(max_new_tokens=300, min_new_tokens=300)
            )
            stream = engine.generate(request)
            for _ in range(index // 5 + 1):
                await anext(stream)
            await stream.aclose()

        leavers = [asyncio.create_task(leave_early(i)) for i in range(20)]
        last = await respond(engine, prompt, request_id="last", seed=3, max_new_tokens=70, min_new_tokens=70)
        await asyncio.gather(*leavers)
    assert same(alone, last)

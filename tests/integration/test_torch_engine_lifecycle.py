"""Pausing, aborting, stopping, weights that change under running requests, and requests that are refused."""

from __future__ import annotations

import asyncio
import pathlib
import threading

import pytest
import torch
from torch_engine_models import (
    END_TOKEN,
    prompt_of,
    reference_log_probs,
    respond,
    running_engine,
    save_checkpoint,
    weights_of,
)
from transformers import AutoTokenizer

from miles.services.rollout.engines.base import EngineFailed, FinishReason, GenerationRequest, PauseMode, SamplingParams
from miles.services.rollout.engines.registry import create_engine
from miles.services.rollout.engines.torch import TorchEngine
from miles.services.rollout.engines.torch.model.architecture import UnsupportedModel
from miles.types import VersionSpan
from miles.weights.base import WeightsRefused

pytestmark = pytest.mark.engine

LONG = {"max_new_tokens": 400, "min_new_tokens": 400}


async def unstopped(engine: TorchEngine, prompt: list[int], length: int) -> tuple[int, list[int]]:
    """A seed and its response of this length, in which no end token came up."""
    for seed in range(20):
        response = await respond(engine, prompt, seed=seed, max_new_tokens=length)
        if response.result.reason is FinishReason.LENGTH:
            return seed, response.tokens
    raise AssertionError("every response met an end token")


async def progress(engine: TorchEngine, tokens: int) -> None:
    """Wait until the engine has drawn this many tokens more."""
    goal = engine.stats().generated_tokens + tokens
    async with asyncio.timeout(200):
        while engine.stats().generated_tokens < goal:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_nothing_decodes_before_the_first_weights(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    async with running_engine(tmp_path, None) as engine:
        assert engine.version is None
        assert await engine.weight_bytes() == {}
        task = asyncio.create_task(respond(engine, prompt_of(5)))
        await asyncio.sleep(0.1)
        assert engine.stats().generated_tokens == 0
        assert engine.stats().waiting_requests == 1
        await engine.load_weights(4, weights_of(model))
        assert (await task).result.weight_versions[0].version == 4
        assert engine.version == 4


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
async def test_a_paused_engine_draws_nothing_until_it_resumes(tmp_path: pathlib.Path, mode: PauseMode) -> None:
    model = save_checkpoint(tmp_path, "llama")
    async with running_engine(tmp_path, weights_of(model)) as engine:
        tasks = [asyncio.create_task(respond(engine, prompt_of(5, i), request_id=str(i), **LONG)) for i in range(3)]
        await progress(engine, 20)
        await engine.pause(mode)
        await engine.pause(mode)
        before = engine.stats().generated_tokens
        await asyncio.sleep(0.1)
        assert engine.stats().generated_tokens == before
        assert engine.stats().running_requests == (3 if mode is PauseMode.IN_PLACE else 0)
        await engine.resume()
        for task in tasks:
            assert len((await task).tokens) == 400


async def test_pausing_by_abort_ends_running_and_waiting_requests_with_what_they_have(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    async with running_engine(tmp_path, weights_of(model), max_running_requests=2) as engine:
        prompts = [prompt_of(5, i) for i in range(3)]
        tasks = [asyncio.create_task(respond(engine, p, request_id=str(i), **LONG)) for i, p in enumerate(prompts)]
        await progress(engine, 20)
        await engine.pause(PauseMode.ABORT)
        responses = await asyncio.gather(*tasks)
        assert {response.result.reason for response in responses} == {FinishReason.ABORT}
        assert responses[2].tokens == []
        for prompt, response in zip(prompts[:2], responses[:2], strict=True):
            assert response.result.weight_versions == (VersionSpan(0, 0, len(response.tokens)),)
            expected = reference_log_probs(model, prompt, response.tokens)
            torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=0)


async def test_abort_ends_the_named_requests_alone(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    async with running_engine(tmp_path, weights_of(model)) as engine:
        tasks = {
            name: asyncio.create_task(respond(engine, prompt_of(5), request_id=name, **LONG)) for name in ("a", "b")
        }
        await progress(engine, 10)
        await engine.abort(["a", "never heard of"])
        aborted = await tasks["a"]
        assert aborted.result.reason is FinishReason.ABORT
        assert 0 < len(aborted.tokens) < 400
        await engine.abort()
        assert (await tasks["b"]).result.reason is FinishReason.ABORT


async def test_leaving_the_stream_aborts_the_request(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    async with running_engine(tmp_path, weights_of(model)) as engine:
        stream = engine.generate(GenerationRequest("r", prompt_of(5), SamplingParams(max_new_tokens=400)))
        await anext(stream)
        await stream.aclose()
        await engine.pause(PauseMode.IN_PLACE)
        assert engine.stats().running_requests == 0


async def test_weights_swapped_mid_response_are_used_from_the_next_token_on(tmp_path: pathlib.Path) -> None:
    old, new = save_checkpoint(tmp_path, "qwen3", seed=1), save_checkpoint(tmp_path, "qwen3", seed=2)
    prompt = prompt_of(6)
    async with running_engine(tmp_path, weights_of(old), version=7) as engine:
        task = asyncio.create_task(respond(engine, prompt, seed=9, max_new_tokens=100, min_new_tokens=100))
        await progress(engine, 10)
        await engine.pause(PauseMode.RETRACT)
        assert await engine.load_weights(8, weights_of(new)) >= 0
        await engine.resume()
        response = await task
        first, second = response.result.weight_versions
        assert (first.version, first.start, second.version, second.end) == (7, 0, 8, 100)
        assert first.end == second.start
        assert 10 <= first.end < 100
        cut = first.end
        expected = torch.cat(
            [
                reference_log_probs(old, prompt, response.tokens)[:cut],
                reference_log_probs(new, prompt, response.tokens)[cut:],
            ]
        )
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=0)
        fresh = await respond(
            engine, prompt, resumed=response.tokens[:cut], seed=9, max_new_tokens=100, min_new_tokens=100
        )
    assert fresh.tokens == response.tokens[cut:]
    assert fresh.log_probs == response.log_probs[cut:]


async def test_swapping_in_place_keeps_old_keys_for_running_requests_only(tmp_path: pathlib.Path) -> None:
    old, new = save_checkpoint(tmp_path, "qwen3", seed=1), save_checkpoint(tmp_path, "qwen3", seed=2)
    prompt = prompt_of(40)
    async with running_engine(tmp_path, weights_of(old)) as engine:
        task = asyncio.create_task(respond(engine, prompt, request_id="old", seed=9, **LONG))
        await progress(engine, 10)
        await engine.load_weights(1, weights_of(new))
        fresh = await respond(engine, prompt, request_id="new", seed=1)
        await engine.abort(["old"])
        mixed = await task
    assert fresh.result.cached_prompt_tokens == 0
    expected = reference_log_probs(new, prompt, fresh.tokens)
    torch.testing.assert_close(torch.tensor(fresh.log_probs), expected, atol=1e-5, rtol=0)
    assert [span.version for span in mixed.result.weight_versions] == [0, 1]
    cut = mixed.result.weight_versions[1].start
    recomputed = reference_log_probs(new, prompt, mixed.tokens)[cut:]
    assert (torch.tensor(mixed.log_probs[cut:]) - recomputed).abs().max() > 1e-3


async def test_weights_that_do_not_fit_are_refused_before_anything_changed(tmp_path: pathlib.Path) -> None:
    tensors = weights_of(save_checkpoint(tmp_path, "llama"))
    async with running_engine(tmp_path, tensors, version=3) as engine:
        bad = {name: tensor + 1 for name, tensor in tensors.items()}
        bad["model.norm.weight"] = torch.ones(7)
        bad["model.layers.0.mlp.up_proj.weight"] = bad["model.layers.0.mlp.up_proj.weight"].bfloat16()
        bad["model.layers.9.mlp.up_proj.weight"] = torch.ones(1)
        del bad["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(WeightsRefused) as refused:
            await engine.load_weights(4, bad)
        for fault in ("norm.weight: shape (7,)", "dtype torch.bfloat16", "layers.9.mlp", "layers.1.mlp.up_proj"):
            assert fault in str(refused.value)
        assert engine.version == 3
        served = await engine.weight_bytes()
        assert served.keys() == tensors.keys()
        assert all(served[name].data_ptr() == tensors[name].data_ptr() for name in tensors)


async def test_staged_weights_are_served_once_they_are_loaded_and_not_in_place_of_others(
    tmp_path: pathlib.Path,
) -> None:
    first, second = (weights_of(save_checkpoint(tmp_path, "qwen3", seed=seed)) for seed in (1, 2))
    async with running_engine(tmp_path, first, version=7) as engine:
        await engine.stage_weights(second)
        assert engine.version == 7
        for version, tensors in ((8, first), (9, second)):
            await engine.load_weights(version, tensors)
            served = await engine.weight_bytes()
            assert all(served[name].data_ptr() == tensors[name].data_ptr() for name in tensors)
            await engine.stage_weights(second)


async def test_a_tied_head_may_be_sent_under_either_name(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    tensors = weights_of(model)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    async with running_engine(tmp_path, tensors) as engine:
        response = await respond(engine, prompt_of(5))
    expected = reference_log_probs(model, prompt_of(5), response.tokens)
    torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=0)


async def test_responses_end_at_end_tokens_stop_tokens_and_length(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    tensors = weights_of(model)
    prompt = prompt_of(5)
    async with running_engine(tmp_path, tensors) as engine:
        seed, free = await unstopped(engine, prompt, 60)
        token = free[20]
        stopped = await respond(engine, prompt, seed=seed, max_new_tokens=60, stop_token_ids=(token,))
        assert stopped.tokens == free[: free.index(token) + 1]
        assert stopped.result.reason is FinishReason.STOP
        one = await respond(engine, prompt, seed=seed, max_new_tokens=1)
        assert one.tokens == free[:1]
        done = await respond(engine, prompt, resumed=free[:30], max_new_tokens=30)
        assert done.tokens == []
        assert done.result.reason is FinishReason.LENGTH
        assert END_TOKEN not in (await respond(engine, prompt, max_new_tokens=300, min_new_tokens=300)).tokens[:299]
        until_end = await respond(engine, prompt, max_new_tokens=500)
        assert until_end.tokens[-1] == END_TOKEN
        assert until_end.result.reason is FinishReason.STOP


async def test_a_stop_string_may_span_tokens(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    prompt = prompt_of(5)
    async with running_engine(tmp_path, weights_of(model)) as engine:
        decode = AutoTokenizer.from_pretrained(tmp_path).decode
        seed, free = await unstopped(engine, prompt, 100)
        end = next(i for i in range(3, 100) if len(decode(free[i - 3 : i])) == 3 and decode(free[i - 3 : i]).isascii())
        stop = decode(free[end - 3 : end])
        response = await respond(engine, prompt, seed=seed, max_new_tokens=100, stop=("never this", stop))
        late = await respond(engine, prompt, seed=seed, max_new_tokens=100, min_new_tokens=end + 1, stop=(stop,))
    assert response.tokens == free[:end]
    assert response.result.reason is FinishReason.STOP
    assert len(late.tokens) > end


async def test_more_requests_than_slots_all_finish(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "qwen2")
    async with running_engine(tmp_path, weights_of(model), max_running_requests=3) as engine:
        assert engine.max_running_requests == 3
        responses = await asyncio.gather(
            *(respond(engine, prompt_of(4 + i, i), request_id=str(i), max_new_tokens=5 + i) for i in range(11))
        )
        assert engine.stats().running_requests == engine.stats().waiting_requests == 0
        assert engine.stats().generated_tokens == sum(len(response.tokens) for response in responses)
        assert engine.stats().busy_s > 0


async def test_requests_that_cannot_be_served_are_refused_with_all_their_faults(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    async with running_engine(tmp_path, weights_of(model), max_total_tokens=64) as engine:
        with pytest.raises(
            ValueError, match="prompt of 60 tokens and max_new_tokens 5 exceed the engine's limit of 64"
        ):
            await respond(engine, prompt_of(60), max_new_tokens=5)
        with pytest.raises(ValueError, match=r"(?s)top_p is 0.*seed is -1"):
            await respond(engine, prompt_of(5), top_p=0.0, seed=-1)
        with pytest.raises(ValueError, match="not in the vocabulary of 320"):
            await respond(engine, [1, 320])
        with pytest.raises(ValueError, match="no prompt"):
            await respond(engine, [], resumed=[1])
        assert len((await respond(engine, prompt_of(60), max_new_tokens=4, min_new_tokens=4)).tokens) == 4


async def test_two_requests_with_one_id_are_refused(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    async with running_engine(tmp_path, weights_of(model)) as engine:
        task = asyncio.create_task(respond(engine, prompt_of(5), **LONG))
        await progress(engine, 2)
        with pytest.raises(ValueError, match="a request with this id is running"):
            await respond(engine, prompt_of(5))
        await engine.abort()
        await task


async def test_an_engine_that_is_not_wanted_any_more_while_it_starts_leaves_no_thread(tmp_path: pathlib.Path) -> None:
    def threads() -> int:
        return sum(thread.name == "torch-engine" for thread in threading.enumerate())

    save_checkpoint(tmp_path, "llama")
    before = threads()
    starting = asyncio.create_task(TorchEngine(tmp_path, device="cpu").start())
    async with asyncio.timeout(200):
        while threads() == before:  # noqa: ASYNC110
            await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        assert starting.cancelled()
        while threads() != before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_closing_ends_running_requests(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "llama")
    async with running_engine(tmp_path, weights_of(model)) as engine:
        task = asyncio.create_task(respond(engine, prompt_of(5), **LONG))
        await progress(engine, 2)
        await engine.close()
        assert (await task).result.reason is FinishReason.ABORT
        with pytest.raises(RuntimeError, match="not running"):
            await engine.resume()


async def test_sequences_longer_than_a_window_are_refused(tmp_path: pathlib.Path) -> None:
    from transformers import Qwen2Config

    save_checkpoint(tmp_path, "llama")
    Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=0).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"sliding_window=16, .* set rollout_max_context_len to at most 16"):
        await TorchEngine(tmp_path, device="cpu").start()
    with pytest.raises(UnsupportedModel, match="sliding_window=16"):
        await TorchEngine(tmp_path, device="cpu", max_total_tokens=17).start()
    Qwen2Config(layer_types=["linear_attention"] * 32).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="layers of type linear_attention"):
        await TorchEngine(tmp_path, device="cpu").start()


def test_engines_are_chosen_by_name(tmp_path: pathlib.Path) -> None:
    assert isinstance(create_engine("torch", hf_checkpoint=tmp_path, device="cpu"), TorchEngine)
    with pytest.raises(ValueError, match="unknown rollout backend 'sglang2'"):
        create_engine("sglang2")


async def test_weights_that_give_no_numbers_fail_requests_but_not_the_engine(tmp_path: pathlib.Path) -> None:
    tensors = weights_of(save_checkpoint(tmp_path, "llama"))
    broken = {**tensors, "model.norm.weight": torch.full_like(tensors["model.norm.weight"], torch.nan)}
    async with running_engine(tmp_path, broken, version=5) as engine:
        with pytest.raises(EngineFailed, match="request r: weights of version 5 give logits that are not numbers"):
            await respond(engine, prompt_of(5))
        assert engine.stats().running_requests == 0
        await engine.load_weights(6, tensors)
        assert (await respond(engine, prompt_of(5), max_new_tokens=4)).tokens

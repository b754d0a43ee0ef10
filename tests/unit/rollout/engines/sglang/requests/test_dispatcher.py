"""What becomes of drafts, as events of a real HTTP server tell it, which streams responses as SGLang does."""

from __future__ import annotations

import json
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from miles.change_signal import ChangeSignal
from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.sglang import SglangOptions
from miles.services.rollout.engines.sglang.background import BackgroundCalls
from miles.services.rollout.engines.sglang.requests.dispatcher import Dispatcher, ModelAbilities
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.types import SpeculativeStats


def event(tokens: list[int], *, verified: int, accepted: int, finished: bool = False) -> bytes:
    meta: dict[str, Any] = {
        "completion_tokens": len(tokens),
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        "weight_versions": [{"version": "4", "start": 0, "end": len(tokens)}],
        "finish_reason": {"type": "length"} if finished else None,
        "spec_verify_ct": verified,
        "spec_num_correct_drafts": accepted,
        "spec_num_proposed_drafts": 3 * verified,
    }
    return b"data: " + json.dumps({"output_ids": tokens, "meta_info": meta}).encode() + b"\n\n"


async def generate(request: web.Request) -> web.StreamResponse:
    stream = web.StreamResponse()
    await stream.prepare(request)
    await stream.write(event([5, 6, 7], verified=2, accepted=1))
    await stream.write(event([5, 6, 7, 8, 9, 1], verified=3, accepted=3, finished=True))
    await stream.write(b"data: [DONE]\n\n")
    return stream


async def answer(request: web.Request) -> web.Response:
    return web.json_response({"loads": []})


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    async def on_ready(which: Replica) -> None:
        pass

    app = web.Application()
    app.router.add_post("/generate", generate)
    app.router.add_post("/abort_request", answer)
    app.router.add_get("/server_info", answer)
    app.router.add_get("/v1/loads", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    options: dict[str, Any] = {"hf_checkpoint": "m", "device": "cpu", "addresses": (f"{host}:{port}",)}
    started = Replica(SglangOptions(**options), 0, on_ready, lambda: None)
    await started.start()
    started.hold(4)
    yield started
    await started.close()
    await runner.cleanup()


def dispatcher(replica: Replica, folder: pathlib.Path, seen: list[tuple[int, SpeculativeStats]]) -> Dispatcher:
    made = Dispatcher(
        *(SglangOptions(hf_checkpoint=str(folder), device="cpu"), [replica], ChangeSignal(), BackgroundCalls()),
        wanted_version=lambda: 4,
        on_waiting=lambda: None,
        on_verified=lambda version, new: seen.append((version, new)),
    )
    made.model = ModelAbilities(vocabulary=100, max_total_tokens=100, seeded=False)
    return made


def stats(accepted: int, verified: int) -> SpeculativeStats:
    return SpeculativeStats(accepted, 3 * verified, verified)


async def test_what_is_counted_is_what_the_response_says(replica: Replica, tmp_path: pathlib.Path) -> None:
    seen: list[tuple[int, SpeculativeStats]] = []
    deltas = [
        delta
        async for delta in dispatcher(replica, tmp_path, seen).generate(
            GenerationRequest("r", [1, 2], SamplingParams(6))
        )
    ]
    assert [token for delta in deltas for token in delta.token_ids] == [5, 6, 7, 8, 9, 1]
    assert seen == [(4, stats(1, 2)), (4, stats(2, 1))]
    last = deltas[-1].result
    assert last is not None
    assert last.speculative == stats(3, 3)


async def test_a_response_that_is_left_counts_as_far_as_it_was_seen(replica: Replica, tmp_path: pathlib.Path) -> None:
    seen: list[tuple[int, SpeculativeStats]] = []
    response = dispatcher(replica, tmp_path, seen).generate(GenerationRequest("r", [1, 2], SamplingParams(6)))
    assert (await anext(response)).token_ids == [5, 6, 7]
    await response.aclose()
    assert seen == [(4, stats(1, 2))]

"""Versions of a draft model through the real weight-sync service into a real SGLang server on the CPU.

Nothing is speculated there: the server has no draft model, and loads what is for one into nothing. What is shown is
that the draft's versions arrive and that the policy stays as it is.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch
from sglang_kit import ON_GPU, have_sglang, largest_difference, options, reference_log_probs, respond, running
from torch_engine_models import prompt_of, save_checkpoint, weights_of
from weight_host import DRAFT, JOB, Host

from miles.services.rollout.engines.sglang import SglangEngine
from miles.services.rollout.engines.sglang.weights.checker import checksum
from miles.services.rollout.serving.subscriptions import subscribe_draft
from miles.weights.base import WeightsRefused
from miles.weights.manifest import ChecksumMismatch

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
    pytest.mark.asyncio(loop_scope="module"),
]
LONG = {"max_new_tokens": 400, "min_new_tokens": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("sglang-draft")


@pytest.fixture(scope="module")
def models(folder: pathlib.Path) -> list[torch.nn.Module]:
    """The policy, and a draft."""
    return [save_checkpoint(folder / str(seed), "qwen3", seed, initializer_range=0.1) for seed in (0, 1)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: pathlib.Path, models: list[torch.nn.Module]) -> AsyncIterator[SglangEngine]:
    async with running(options(folder / "0", folder / "logs")) as started:
        assert started.draft is None
        started._find_draft({"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": str(folder / "1")})
        await started.load_weights(5, weights_of(models[0]))
        yield started


async def test_a_draft_is_followed_and_the_policy_serves_on(
    engine: SglangEngine, models: list[torch.nn.Module], folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    draft, api = engine.draft, engine.replicas[0].api
    assert draft is not None
    before = await checksum(api, "target", 60.0)
    host = Host(tmp_path)
    host.stream = DRAFT
    await host.start()
    subscriber = await subscribe_draft(host.address, JOB, "rollout-0", draft)
    try:
        tasks = [asyncio.create_task(respond(engine, prompt_of(9 + i, i), **LONG)) for i in range(4)]
        for version in (1, 2):
            await host.publish(version, weights_of(models[1]))
            done = await host.activate(version)
            assert (done.engines, done.quarantined) == (1, 0)
            assert (draft.version, engine.version) == (version, 5)
        [held] = (await host.list()).engines
        assert (held.engine_id, held.stream, held.version) == ("rollout-0", DRAFT, 2)

        with pytest.raises(ChecksumMismatch, match="or has none"):  # the server said yes to all of it
            await draft.weight_bytes()
        bad = {**weights_of(models[1]), "model.norm.weight": torch.ones(3)}
        await host.publish(3, bad)
        with pytest.raises(WeightsRefused, match="do not fit the draft model"):
            await host.activate(3, deadline_s=10)
        for i, task in enumerate(tasks):
            response = await task
            assert [span.version for span in response.result.weight_versions] == [5]
            assert len(response.tokens) == 400
            expected = reference_log_probs(models[0], prompt_of(9 + i, i), response.tokens, impossible=[256])
            assert largest_difference(response, expected) < 1e-5
        assert await checksum(api, "target", 60.0) == before
    finally:
        await subscriber.close()
        await host.close()

"""Weights by broadcast from a trainer's rank straight into real SGLang servers on the CPU, and what breaks it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import pathlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from broadcast_kit import PATIENT, QUICK, Published, publish, transport
from sglang_kit import (
    ON_GPU,
    have_sglang,
    largest_difference,
    options,
    published_weights,
    reference_log_probs,
    respond,
    running,
)
from torch_engine_models import prompt_of, save_checkpoint, weights_of
from weight_host import JOB, POLICY, Host

from miles.config.server_groups import Server
from miles.rpc.gen import weightsync_pb2
from miles.services.rollout.engines.sglang import SglangEngine
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.weights.broadcast_member import ServerMember
from miles.weights import SubscriberState, WeightSubscriber
from miles.weights.base import Endpoint
from miles.weights.check import check_weight_update_equal
from miles.weights.transports.collective.group import Timing, Watch
from miles.weights.transports.collective.transport import CollectiveTransport

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(2700),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
    pytest.mark.asyncio(loop_scope="module"),
]
BUCKET_BYTES = 1 << 15
DEADLINE_S = 900.0
Models = list[torch.nn.Module]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("sglang-distributed")


@pytest.fixture(scope="module")
def models(folder: pathlib.Path) -> Models:
    """Two models of one architecture with other weights; publication p is models[p % 2]."""
    return [save_checkpoint(folder / str(seed), "qwen3", seed, initializer_range=0.1) for seed in (0, 1)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: pathlib.Path, models: Models) -> AsyncIterator[SglangEngine]:
    """Two servers, of which the second has a flag of its own."""
    servers = (Server(1, {}), Server(1, {"chunked_prefill_size": 128}))
    async with running(options(folder / "0", folder / "logs", servers=servers, weight_path="distributed")) as started:
        yield started


async def test_servers_have_flags_of_their_own(engine: SglangEngine) -> None:
    first, second = [await replica.api.get("/server_info", DEADLINE_S) for replica in engine.replicas]
    assert second["chunked_prefill_size"] == 128 != first["chunked_prefill_size"]


@pytest.fixture
def rank() -> Iterator[Callable[..., CollectiveTransport]]:
    """Makes trainer ranks that are gone after the test."""
    made: list[CollectiveTransport] = []

    def make(timing: Timing = QUICK) -> CollectiveTransport:
        made.append(transport(timing=timing))
        return made[-1]

    yield make
    for each in made:
        each.close()


async def load(engine: SglangEngine, published: Published) -> None:
    """What the subscriber does with a version: prefetch, swap."""
    receiver = engine.create_receiver(weightsync_pb2.TRANSPORT_KIND_COLLECTIVE, Endpoint(device=engine.device))
    async with asyncio.timeout(DEADLINE_S / 3):
        received = await asyncio.to_thread(receiver.receive, *published)
        await engine.load_weights(published[1].version.version, received.tensors)


async def check_served(engine: SglangEngine, model: torch.nn.Module, groups: int = 1) -> None:
    """Responses have the model's log-probabilities, on as many servers as there are groups."""
    for group in range(groups):
        prompt = prompt_of(9 + group, group)
        async with asyncio.timeout(DEADLINE_S / 3):
            response = await respond(engine, prompt, group=f"{engine.version}-{group}")
        assert {span.version for span in response.result.weight_versions} == {engine.version}
        assert largest_difference(response, reference_log_probs(model, prompt, response.tokens)) < 1e-5


class Interrupted(ServerMember):
    """Something happens when two buckets have been received."""

    def __init__(self, replica: Replica, happens: Callable[[], None]) -> None:
        super().__init__(replica.api, 1)
        self._happens = happens
        self._updates = 0

    def _call(self, path: str, body: Mapping[str, Any], watch: Watch) -> None:
        self._updates += path == "/update_weights_from_distributed"
        if self._updates == 3:
            self._updates += 1
            self._happens()
        super()._call(path, body, watch)


@pytest.mark.slow
async def test_servers_take_the_bytes_of_two_ranks_and_keep_their_groups(
    engine: SglangEngine, models: Models, rank: Callable[..., CollectiveTransport]
) -> None:
    patient = dataclasses.replace(PATIENT, gather_s=3.0)  # one broadcast to both servers, however late one asks
    ranks = [rank(patient), rank(patient)]
    for version in (1, 2, 3):
        published = publish(ranks, version, weights_of(models[version % 2]), BUCKET_BYTES)
        assert len(published[0].collective.buckets) > 4
        await load(engine, published)
        await check_served(engine, models[version % 2], groups=4)
        check_weight_update_equal(published[1], await engine.weight_bytes())
    assert [each.source.broadcasts for each in ranks] == [6, 6], "each version once for all, and once for the check"


async def test_a_server_that_dies_in_the_middle_comes_back_with_the_version_of_the_other(
    engine: SglangEngine, models: Models, rank: Callable[[], CollectiveTransport]
) -> None:
    victim, other = engine.replicas
    pid = victim.pid
    assert pid is not None
    victim.member = Interrupted(victim, lambda: os.killpg(pid, signal.SIGKILL))
    await load(engine, publish([rank()], 4, weights_of(models[0]), BUCKET_BYTES))
    assert (victim.version, other.version) == (None, 4)
    await check_served(engine, models[0])
    async with asyncio.timeout(DEADLINE_S):
        while victim.version is None:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    await check_served(engine, models[0], groups=4)
    await engine.weight_bytes()


async def test_a_trainer_that_dies_in_the_middle_leaves_nobody_serving_until_a_full_load(
    engine: SglangEngine, models: Models, rank: Callable[[], CollectiveTransport]
) -> None:
    source = rank()
    published = publish([source], 5, weights_of(models[1]), BUCKET_BYTES)
    first, _ = engine.replicas
    first.member = Interrupted(first, source.close)
    pids = [replica.pid for replica in engine.replicas]
    with pytest.raises(ConnectionError):
        await load(engine, published)
    assert [replica.version for replica in engine.replicas] == [None, None]
    waiting = asyncio.create_task(respond(engine, prompt_of(7)))
    await asyncio.sleep(0.5)
    assert engine.stats().running_requests == 0
    await load(engine, publish([rank()], 6, weights_of(models[0]), BUCKET_BYTES))
    response = await waiting
    assert largest_difference(response, reference_log_probs(models[0], prompt_of(7), response.tokens)) < 1e-5
    await check_served(engine, models[0], groups=4)
    await engine.weight_bytes()
    assert [replica.pid for replica in engine.replicas] == pids, "the servers are not to blame"


async def test_the_weight_sync_service_leads_servers_and_takes_back_those_that_were_in_doubt(
    engine: SglangEngine, models: Models, tmp_path: pathlib.Path
) -> None:
    host = Host(tmp_path)
    await host.start()
    states: list[SubscriberState] = []
    subscriber = WeightSubscriber(
        *(host.address, JOB, "rollout-0", POLICY, engine, states.append), create_receiver=engine.create_receiver
    )
    await subscriber.start()
    try:
        await host.publish(7, weights_of(models[1]), transport="COLLECTIVE", bucket_bytes=BUCKET_BYTES)
        done = await host.activate(7, check_equal=True)
        assert (done.engines, done.quarantined) == (1, 0)
        await check_served(engine, models[1], groups=4)

        first, _ = engine.replicas
        first.member = Interrupted(first, _raise)
        await host.publish(8, weights_of(models[0]), transport="COLLECTIVE", bucket_bytes=BUCKET_BYTES)
        states.clear()
        await host.activate(8)
        expected = [SubscriberState.PREFETCHED, SubscriberState.QUARANTINED, SubscriberState.SERVING]
        # It is told of its quarantine, too.
        assert [state for state, _ in itertools.groupby(states)] == expected, "a full load, and nothing served before"
        await check_served(engine, models[0], groups=4)
        await engine.weight_bytes()
    finally:
        await subscriber.close()
        await host.close()


def _raise() -> None:
    raise ConnectionError("the network is down")


async def test_every_rank_of_a_server_takes_weights_and_experts_come_once(
    folder: pathlib.Path, rank: Callable[[], CollectiveTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|0")
    model = save_checkpoint(folder / "moe", "qwen3_moe", 3, initializer_range=0.1)
    weights = published_weights(model)
    other = {name: tensor.flip(0).contiguous() for name, tensor in weights.items()}
    given = options(
        folder / "moe", folder / "logs", name="two", gpus_per_engine=2, routed_experts=True, weight_path="distributed"
    )
    prompt = prompt_of(11)
    async with running(given) as engine:
        await engine.load_weights(0, other)
        await engine.weight_bytes()
        await load(engine, publish([rank()], 1, weights, BUCKET_BYTES))
        await engine.weight_bytes()
        response = await respond(engine, prompt, experts=True)
        assert largest_difference(response, reference_log_probs(model, prompt, response.tokens)) < 1e-5
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *response.tokens[:-1]]])
            logits = model(ids, output_router_logits=True).router_logits
        chosen = torch.stack([layer.topk(2, dim=-1).indices for layer in logits], dim=1).sort(dim=-1).values
        found = response.result.routed_experts
        assert found is not None
        np.testing.assert_array_equal(np.sort(found, axis=-1), chosen.numpy())

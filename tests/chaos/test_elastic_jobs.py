"""Asynchronous jobs in all modes, and rollouts that freeze, join, leave and are killed, on the same services."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import gated_reward
import psutil
import pytest
import pytest_asyncio
from chaos_schedules import run_schedules
from chaos_stack import BATCH, Stack, stack

from miles.reward_sdk import Source, start_reward_server
from miles.rpc import connect
from miles.rpc.gen import controller_pb2, rollout_pb2, rollout_pb2_grpc

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]
Workers = dict[str, controller_pb2.Worker]
LONG = 60
"""Steps of a job that is to last until it is told to end."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def services(tiny_dense: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with stack(tiny_dense, tmp_path_factory.mktemp("elastic")) as started:
        yield started


@dataclasses.dataclass
class Gate:
    """Holds a job at its rewards while it is closed."""

    address: str
    path: pathlib.Path

    def open(self) -> None:
        self.path.touch()

    def close(self) -> None:
        self.path.unlink()


@pytest_asyncio.fixture(loop_scope="module")
async def gate(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gate]:
    """A closed gate."""
    path = tmp_path / "gate"
    monkeypatch.setenv(gated_reward.GATE, str(path))
    async with start_reward_server([Source(gated_reward.__file__, script=True)], "127.0.0.1:0", workers=1) as (
        bound,
        _,
    ):
        yield Gate(bound, path)


def gated(gate: Gate, **changes: Any) -> dict[str, Any]:
    """Settings of a long job that waits at the gate."""
    return {
        "rm_type": None,
        "reward_service": [f"default={gate.address}"],
        "reward_timeout_s": 120.0,
        "num_rollout": LONG,
        "save_interval": None,
        "max_weight_staleness": 2,
        **changes,
    }


async def generated(services: Stack, name: str) -> int:
    """Tokens that a rollout has told of, for the job that runs."""
    workers = await services.workers()
    return workers[name].heartbeat.progress if name in workers else 0


async def until_generated(services: Stack, name: str, more_than: int) -> None:
    """Return once a rollout has generated more than so many tokens."""

    def enough(workers: Workers) -> bool:
        return name in workers and workers[name].heartbeat.progress > more_than

    await services.until_workers(enough, f"more than {more_than} tokens from {name}")


async def until_it_serves(services: Stack, name: str) -> None:
    """Return once a rollout has loaded a job and a version of its weights."""
    address = (await services.workers())[name].registration.address
    async with connect(address) as channel:
        stub = rollout_pb2_grpc.RolloutServiceStub(channel)
        for _ in range(600):
            status = await stub.GetStatus(rollout_pb2.RolloutGetStatusRequest(), timeout=10)
            if status.job_ids and status.progress.HasField("version"):
                return
            await asyncio.sleep(0.1)
    raise TimeoutError(f"{name} did not load a job within 60 s")


@pytest.mark.chaos
async def test_a_frozen_rollout_is_fenced_and_rejoins(services: Stack, gate: Gate) -> None:
    await services.until_workers(lambda workers: {"rollout-0", "rollout-1"} <= workers.keys(), "two rollouts")
    job = services.start("frozen", **gated(gate))
    await until_generated(services, "rollout-0", 0)
    before = (await services.workers())["rollout-0"].lease_number
    pid = services.cluster.pid("rollout-0")
    assert pid is not None
    frozen = psutil.Process(pid)
    frozen.suspend()
    try:
        await services.until_workers(lambda workers: "rollout-0" not in workers, "the end of rollout-0's lease")
        gate.open()
        await job.until_step(3)
        gate.close()
    finally:
        frozen.resume()
    await services.until_workers(lambda workers: "rollout-0" in workers, "rollout-0's return")
    assert (await services.workers())["rollout-0"].lease_number > before
    had = await generated(services, "rollout-0")
    gate.open()
    await until_generated(services, "rollout-0", had)
    (await job.end()).assert_every_group_was_trained_once(LONG)


@pytest.mark.chaos
async def test_a_rollout_joins_a_running_job_and_leaves_it(services: Stack, gate: Gate) -> None:
    job = services.start("joined", **gated(gate))
    await until_generated(services, "rollout-1", 0)
    with (services.folder / "rollout-9.log").open("wb") as log:
        joining = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "miles.services.rollout", "--worker-id", "rollout-9", "--device", "cpu"),
            *("--controller", services.cluster.controller_address),
            stdout=log,
            stderr=log,
        )
    try:
        await services.until_workers(lambda workers: "rollout-9" in workers, "rollout-9")
        await until_it_serves(services, "rollout-9")
        gate.open()
        await until_generated(services, "rollout-9", 0)
        gate.close()
        joining.terminate()
        assert await asyncio.wait_for(joining.wait(), 60) == 0
    finally:
        if joining.returncode is None:
            joining.kill()
    assert "rollout-9" not in await services.workers()
    gate.open()
    (await job.end()).assert_every_group_was_trained_once(LONG)


ANY_LENGTH = {"rollout_temperature": 3.0, "rollout_max_response_len": 48}
"""Responses end late or early, so that updates meet them half-way."""
STALE = {
    "max_weight_staleness": 2,
    "update_weights_interval": 2,
    "lr": 5e-3,
    "entropy_coef": 0.01,
    "get_mismatch_metrics": True,
}
"""Every other step trains on samples of the version before; every step changes the weights, whatever the rewards."""


@pytest.mark.parametrize(
    ("pause", "correction", "more"),
    [
        ("in_place", {"use_tis": True}, {"partial_rollout": True}),
        ("retract", {"use_icepop": True}, {"over_sampling_batch_size": BATCH + 2}),
        (
            "abort",
            {"use_mis": True, "use_tis": True, "use_rs": True},
            {"partial_rollout": True, "mask_offpolicy_in_partial_rollout": True},
        ),
    ],
)
async def test_stale_samples_are_corrected_by_what_their_engines_thought_of_them(
    services: Stack, pause: str, correction: dict[str, bool], more: dict[str, object]
) -> None:
    changes = {**ANY_LENGTH, **STALE, **correction, **more, "pause_generation_mode": pause}
    ended = await services.run(f"stale-{pause}", **changes)
    ended.assert_every_group_was_trained_once()
    lines = ended.steps()
    staleness = [line["rollout/fully_async/max_staleness"] for line in lines]
    assert 1 <= max(staleness) <= 2
    # An update every other step leaves the engines one step behind in the steps between, and exact in the first.
    assert staleness[0] == 0
    assert lines[0]["train/mis_k3_kl"] == pytest.approx(0, abs=1e-9)
    stale = [line for line in lines if line["rollout/fully_async/avg_staleness"] >= 1]
    name = "train/mis_tis_weight_before_bound" if "use_mis" in correction else "train/tis"
    assert lines[0][name] == pytest.approx(1, abs=1e-5)
    assert max(line["train/mis_k3_kl"] for line in stale) > 1e-6
    assert max(abs(line[name] - 1) for line in stale) > 1e-6
    for groups, line in zip(ended.samples(), lines, strict=True):
        for sample in (sample for group in groups for sample in group["samples"]):
            spans = sample["weight_versions"]
            assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
            assert spans[-1][2] == sample["response_length"]
            assert line["step"] - 2 <= spans[0][0] <= spans[-1][0] <= line["step"]


async def test_what_is_finished_beyond_a_batch_is_kept(services: Stack) -> None:
    ended = await services.run("surplus", **ANY_LENGTH, max_weight_staleness=1, over_sampling_batch_size=BATCH + 3)
    ended.assert_every_group_was_trained_once()
    assert max(line["rollout/fully_async/queue_size"] for line in ended.steps()) > 0


@pytest.mark.slow
async def test_jobs_survive_random_kills(services: Stack, pytestconfig: pytest.Config) -> None:
    await run_schedules(services, range(2), pytestconfig)

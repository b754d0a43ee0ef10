"""Versions of weights over REST and `miles versions`, from a real weight-sync service."""

from __future__ import annotations

import asyncio
import json
import pathlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import torch
from gateway_stack import Stack
from weight_host import DEADLINE_S, POLICY, GatedEngine, Host

from miles.rpc import WorkerAttachment
from miles.rpc.gen import controller_pb2
from miles.weights import WeightSubscriber


@pytest.fixture
def job(submit: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A job that waits for workers."""
    return submit()


@pytest.fixture
async def host(stack: Stack, job: dict[str, Any], tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    """A weight-sync service that is attached to the controller and holds version 3 of the job."""
    made = Host(tmp_path, job=job["id"])
    await made.start()
    attachment = WorkerAttachment(
        stack.controller.address,
        worker_id="weightsync",
        kind=controller_pb2.WORKER_KIND_WEIGHTSYNC,
        address=made.address,
        heartbeat=lambda: made.servicer.heartbeat(),
    )
    attached = asyncio.create_task(attachment.run())
    await made.publish(3)
    yield made
    attached.cancel()
    await asyncio.gather(attached, return_exceptions=True)
    await made.close()


def miles(stack: Stack, *words: str) -> tuple[int, Any]:
    """Exit code and JSON of a command."""
    command = [sys.executable, "-m", "miles.cli", *words, "--url", stack.local.address, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    return done.returncode, json.loads(done.stdout or "null")


async def test_versions_say_who_holds_what_and_a_check_finds_who_holds_something_else(
    stack: Stack, job: dict[str, Any], host: Host
) -> None:
    subscriber = WeightSubscriber(host.address, job["id"], "rollout-0", POLICY, engine := GatedEngine())
    await subscriber.start()
    await host.activate(3)
    async with httpx.AsyncClient(base_url=stack.local.address, timeout=DEADLINE_S) as client:
        path = f"/v1/jobs/{job['id']}/versions"
        async with asyncio.timeout(DEADLINE_S):
            while (answer := await client.get(path)).status_code != 200:  # noqa: ASYNC110 — until the controller knows the service
                await asyncio.sleep(0.1)
        (version,), (held,) = answer.json()["versions"], answer.json()["engines"]
        assert (version["version"], version["state"], version["size_bytes"]) == (3, "active", 4000)
        assert version["transports"] == ["shared_memory", "grpc_chunks"]
        assert version["active_at"]
        assert set(version["stage_s"]) == {"allocate", "copy", "checksum"}
        assert (held["engine"], held["version"], held["state"], held["attached"]) == ("rollout-0", 3, "serving", True)
        assert held["transport"] == "shared_memory"
        assert set(held["stage_s"]) == {"prefetch", "swap"}
        assert held["since"]
        good = (await client.post(f"{path}/check")).json()
        assert (good["version"], good["equal"], good["quarantined"]) == (3, 1, 0)
        code, listed = await asyncio.to_thread(miles, stack, "versions", job["id"])
        assert (code, listed["engines"][0]["version"]) == (0, 3)
        engine.tensors = {"w": engine.tensors["w"].clone()}
        engine.tensors["w"][17] += torch.tensor(1.0)
        engine.gate.clear()  # it stays out of routing for as long as the test looks
        code, checked = await asyncio.to_thread(miles, stack, "versions", job["id"], "--check")
        assert code != 0
        assert (checked["equal"], checked["quarantined"]) == (0, 1)
        assert "w has other bytes" in checked["engines"][0]["last_error"]
    engine.gate.set()
    await subscriber.close()


async def test_a_check_has_to_wait_for_an_activation(stack: Stack, job: dict[str, Any], host: Host) -> None:
    subscriber = WeightSubscriber(host.address, job["id"], "rollout-0", POLICY, engine := GatedEngine())
    await subscriber.start()
    engine.gate.clear()
    activation = asyncio.create_task(host.activate(3))
    await asyncio.wait_for(engine.loading.wait(), DEADLINE_S)
    async with httpx.AsyncClient(base_url=stack.local.address, timeout=DEADLINE_S) as client:
        async with asyncio.timeout(DEADLINE_S):
            path = f"/v1/jobs/{job['id']}/versions/check"
            while "being activated" not in (answer := await client.post(path)).json()["detail"]:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert answer.status_code == 409
    engine.gate.set()
    assert (await activation).engines == 1
    await subscriber.close()


def test_without_a_weight_sync_service_the_answer_says_so(http: httpx.Client, job: dict[str, Any]) -> None:
    answer = http.get(f"/v1/jobs/{job['id']}/versions")
    assert answer.status_code == 409
    assert "no weight-sync service is attached" in answer.json()["detail"]

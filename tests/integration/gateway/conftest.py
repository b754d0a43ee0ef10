"""A controller and two gateways as processes: one without keys, one with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from gateway_stack import Process, Stack, service, wait_for_state, write_task

from miles.gateway.keys import KeyFile, Scope
from miles.queue import RedisServer


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis, controller and gateways; no workers, so that the first job waits for some and the others for it."""
    folder = tmp_path_factory.mktemp("stack")
    root = folder / "root"
    write_task(root / "tiny")
    keys_file = folder / "keys.json"
    scopes = {"reader": Scope.READ, "alice": Scope.SUBMIT, "bob": Scope.SUBMIT, "boss": Scope.ADMIN}
    keys = {name: KeyFile(keys_file).create(name, scope)[1] for name, scope in scopes.items()}
    with contextlib.ExitStack() as cleaning:
        redis = cleaning.enter_context(RedisServer(folder / "redis"))
        started: list[Process] = []

        def start(process: Process) -> Process:
            process.start()
            cleaning.callback(process.stop)
            started.append(process)
            return process

        controller = service(folder, "controller", "miles.services.controller", "--redis-url", redis.url)
        controller.command += ["--listen", "127.0.0.1:0"]
        start(controller)
        # It must come back where the gateways look for it.
        controller.command[-1] = controller.address
        common = ["--controller", controller.address, "--listen", "127.0.0.1:0", "--allowed-root", str(root)]
        local = start(service(folder, "local", "miles.gateway", *common, "--rate-limit", "100000"))
        local.command[local.command.index("--listen") + 1] = local.address.removeprefix("http://")
        keyed = start(service(folder, "keyed", "miles.gateway", *common, "--keys-file", str(keys_file)))
        yield Stack(root.resolve(), controller, local, keyed, keys, redis)


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    """A client of the gateway without keys."""
    with httpx.Client(base_url=stack.local.address, timeout=120) as client:
        yield client


@pytest.fixture
def submit(stack: Stack, http: httpx.Client) -> Iterator[Callable[..., dict[str, Any]]]:
    """Submits a job; what is still waiting at the end of the test is cancelled."""
    jobs: list[str] = []

    def submit_job(**changes: Any) -> dict[str, Any]:
        answer = http.post("/v1/jobs", json=stack.config(**changes))
        assert answer.status_code == 201, answer.text
        jobs.append(answer.json()["id"])
        made: dict[str, Any] = answer.json()
        return made

    yield submit_job
    for job_id in jobs:
        http.post(f"/v1/jobs/{job_id}/cancel")


@pytest.fixture
def waiting_job(submit: Callable[..., dict[str, Any]], http: httpx.Client) -> dict[str, Any]:
    """A job that waits in the queue behind another one."""
    ahead = submit(name="ahead")
    wait_for_state(http, ahead["id"], "starting", "queued")
    return submit(name="waiting")

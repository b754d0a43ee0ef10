"""TLS and mutual TLS between services, with certificates made here."""

from __future__ import annotations

import asyncio
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import grpc
import pytest
from authority import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc

from miles.rpc import ServiceExit, WorkerAttachment, connect, connect_blocking, start_server
from miles.rpc.gen import controller_pb2, controller_pb2_grpc
from miles.rpc.tls import CA, CERT, KEY, MUTUAL, SERVER_NAME, TlsFiles

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
ALL = (CERT, KEY, CA, MUTUAL, SERVER_NAME)


@pytest.fixture
def authority(tmp_path: pathlib.Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables of this process, and no others."""

    def set_variables(**variables: str) -> None:
        for name in ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_variables()
    return set_variables


async def serve_health() -> tuple[grpc.aio.Server, str]:
    return await start_server(lambda server: None, "127.0.0.1:0", [])


async def health(address: str) -> int:
    """Ask over a new channel."""
    async with connect(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status)


async def test_connections_are_encrypted_and_the_server_is_verified(
    authority: Authority, use: Callable[..., None], tmp_path: pathlib.Path
) -> None:
    use(**authority.issue("server"), **{CA: authority.path})
    server, address = await serve_health()
    assert await health(address) == health_pb2.HealthCheckResponse.SERVING
    with connect_blocking(address) as channel:
        answer = await asyncio.to_thread(
            health_pb2_grpc.HealthStub(channel).Check, health_pb2.HealthCheckRequest(), timeout=5
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    use()
    with pytest.raises(grpc.aio.AioRpcError):  # in the clear
        await health(address)
    use(**{CA: Authority(tmp_path, "other").path})
    with pytest.raises(grpc.aio.AioRpcError, match=r"(?i)certificate|handshake|ssl"):
        await health(address)
    await server.stop(None)


async def test_mutual_tls_refuses_clients_without_a_certificate_of_ours(
    authority: Authority, use: Callable[..., None], tmp_path: pathlib.Path
) -> None:
    mutual = {CA: authority.path, MUTUAL: "1"}
    use(**authority.issue("server"), **mutual)
    server, address = await serve_health()
    use(**authority.issue("client"), **mutual)
    assert await health(address) == health_pb2.HealthCheckResponse.SERVING
    use(**{CA: authority.path})
    with pytest.raises(grpc.aio.AioRpcError):
        await health(address)
    use(**Authority(tmp_path, "other").issue("stranger"), **mutual)
    with pytest.raises(grpc.aio.AioRpcError):
        await health(address)
    await server.stop(None)


async def test_a_certificate_of_another_name_or_time_is_refused(authority: Authority, use: Callable[..., None]) -> None:
    use(**authority.issue("server", days=-1), **{CA: authority.path})
    server, address = await serve_health()
    with pytest.raises(grpc.aio.AioRpcError):
        await health(address)
    await server.stop(None)
    use(**authority.issue("node-7"), **{CA: authority.path, SERVER_NAME: "node-8"})
    server, address = await serve_health()
    with pytest.raises(grpc.aio.AioRpcError):
        await health(address)
    use(**authority.issue("node-7"), **{CA: authority.path, SERVER_NAME: "node-7"})
    assert await health(address) == health_pb2.HealthCheckResponse.SERVING
    await server.stop(None)


async def test_a_worker_attaches_over_mutual_tls(authority: Authority, use: Callable[..., None]) -> None:
    """An attachment is a stream in both directions, kept open."""
    from miles.services.controller.service import ControllerServicer
    from miles.services.controller.workers.registry import WorkerRegistry

    use(**authority.issue("node"), **{CA: authority.path, MUTUAL: "1"})
    registry = WorkerRegistry()
    servicer = ControllerServicer(None, None, registry)  # type: ignore[arg-type]
    server, address = await start_server(
        lambda server: controller_pb2_grpc.add_ControllerServiceServicer_to_server(servicer, server), "127.0.0.1:0", []
    )
    attachment = WorkerAttachment(
        address,
        worker_id="rollout-0",
        kind=controller_pb2.WORKER_KIND_ROLLOUT,
        address="127.0.0.1:1",
        heartbeat=controller_pb2.WorkerHeartbeat,
    )
    attached = asyncio.create_task(attachment.run())
    (worker,) = await registry.require(controller_pb2.WORKER_KIND_ROLLOUT, "a rollout", 10, lambda worker: True)
    assert worker.worker_id == "rollout-0"
    attached.cancel()
    await asyncio.gather(attached, return_exceptions=True)
    await server.stop(None)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({CERT: "a"}, f"{CERT} and {KEY} go together"),
        ({CA: "a", MUTUAL: "1"}, f"{MUTUAL}=1 needs"),
    ],
)
def test_half_a_setup_is_refused(variables: dict[str, str], problem: str) -> None:
    with pytest.raises(ServiceExit, match=problem):
        TlsFiles.from_environment(variables)


def test_files_that_cannot_be_read_are_named() -> None:
    files = TlsFiles.from_environment({CERT: "/none/c.pem", KEY: "/none/k.pem"})
    assert files is not None
    assert TlsFiles.from_environment(files.to_environment()) == files
    with pytest.raises(ServiceExit, match=r"/none/c\.pem cannot be read"):
        files.server_credentials()
    only_authority = TlsFiles.from_environment({CA: "/none/ca.pem"})
    assert only_authority is not None
    with pytest.raises(ServiceExit, match="a server needs"):
        only_authority.server_credentials()


def test_a_service_with_bad_certificates_says_so_and_ends() -> None:
    command = [sys.executable, "-m", "miles.services.weightsync", "--listen", "127.0.0.1:0"]
    environment = {**os.environ, CERT: "/none/c.pem", KEY: "/none/k.pem"}
    ran = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 2
    assert "cannot be read" in ran.stderr

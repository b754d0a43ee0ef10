"""A worker whose controller will never answer says why at once, and goes on trying for one that may."""

from __future__ import annotations

import asyncio
import http.server
import pathlib
import threading
from collections.abc import Iterator

import grpc
import pytest
from authority import Authority

from miles.rpc import ExitCode, ServiceExit, WorkerAttachment, start_server
from miles.rpc.gen import controller_pb2
from miles.rpc.refusals import cause
from miles.rpc.tls import CA, CERT, KEY, MUTUAL, SERVER_NAME


@pytest.fixture(autouse=True)
def in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CERT, KEY, CA, MUTUAL, SERVER_NAME):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


async def attach(controller: str) -> None:
    attachment = WorkerAttachment(
        controller,
        worker_id="rollout-0",
        kind=controller_pb2.WORKER_KIND_ROLLOUT,
        address="127.0.0.1:1",
        heartbeat=controller_pb2.WorkerHeartbeat,
    )
    async with asyncio.timeout(60):
        await attachment.run()


async def test_another_service_is_no_controller() -> None:
    server, address = await start_server(lambda server: None, "127.0.0.1:0", [])
    with pytest.raises(ServiceExit, match="another gRPC service") as ended:
        await attach(address)
    assert ended.value.code is ExitCode.NOT_A_CONTROLLER
    await server.stop(None)


async def test_a_web_server_is_no_controller(web_server: str) -> None:
    with pytest.raises(ServiceExit, match="speaks no gRPC") as ended:
        await attach(web_server)
    assert ended.value.code is ExitCode.NOT_A_CONTROLLER


async def test_a_controller_of_another_authority_or_without_tls_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Authority(tmp_path, "ours")
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "other")
    plain, plain_address = await start_server(lambda server: None, "127.0.0.1:0", [])
    for name, value in ours.issue("server").items():
        monkeypatch.setenv(name, value)
    encrypted, encrypted_address = await start_server(lambda server: None, "127.0.0.1:0", [])
    monkeypatch.delenv(CERT)
    monkeypatch.delenv(KEY)
    with pytest.raises(ServiceExit, match="it wants TLS"):
        await attach(encrypted_address)
    monkeypatch.setenv(CA, other.path)
    with pytest.raises(ServiceExit, match="CERTIFICATE_VERIFY_FAILED") as ended:
        await attach(encrypted_address)
    assert ended.value.code is ExitCode.TLS_FAILED
    with pytest.raises(ServiceExit, match="does not speak TLS"):
        await attach(plain_address)
    await plain.stop(None)
    await encrypted.stop(None)


def test_a_controller_that_may_come_back_is_waited_for() -> None:
    unavailable = grpc.StatusCode.UNAVAILABLE
    assert cause(unavailable, "last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused") is None
    assert cause(unavailable, "errors resolving controller:50: Temporary failure in name resolution") is None
    assert cause(unavailable, "Socket closed") is None
    found = cause(unavailable, "errors resolving x:50: address lookup failed for x:50: Domain name not found")
    assert found == (ExitCode.CONTROLLER_UNREACHABLE, "there is no such host")


async def test_a_bare_ipv6_host_is_listened_on_and_told_in_brackets() -> None:
    server, address = await start_server(lambda server: None, "::1:0", [])
    assert address.startswith("[::1]:")
    await server.stop(None)


async def test_a_host_of_another_machine_is_not_called_a_taken_port() -> None:
    with pytest.raises(ServiceExit, match="Cannot assign requested address") as ended:
        await start_server(lambda server: None, "192.0.2.1:0", [])
    assert ended.value.code is ExitCode.BAD_CONFIG

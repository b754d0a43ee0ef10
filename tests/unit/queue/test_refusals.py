"""A Redis that will never serve is told from one that may, at once and without its password."""

from __future__ import annotations

import pathlib
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator

import pytest
import redis
from redis.exceptions import BusyLoadingError, ConnectionError, ResponseError

from miles.addresses import free_port
from miles.queue import RedisRefused, RedisUnsuitable, connect, connect_async
from miles.queue.refusals import Patience, why_never
from miles.queue.server import server_binary

PASSWORD = "pw-right"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a server with a password and a user who may not write our keys."""
    port, folder = free_port(), tmp_path_factory.mktemp("redis")
    settings = ["user limited on >pw-right ~other:* +@all", f"requirepass {PASSWORD}", "databases 2", f"port {port}"]
    (folder / "redis.conf").write_text("\n".join([*settings, 'save ""', f"dir {folder}"]) + "\n")
    server = subprocess.Popen([server_binary(), str(folder / "redis.conf")], stdout=subprocess.DEVNULL)
    connect(f"redis://:{PASSWORD}@127.0.0.1:{port}").close()
    yield port
    server.kill()
    server.wait()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://:pw-secret@127.0.0.1:{port}", "it refuses user and password"),
        ("redis://nobody:pw-secret@127.0.0.1:{port}", "it refuses user and password"),
        ("redis://127.0.0.1:{port}", "it wants a password"),
        ("redis://limited:pw-right@127.0.0.1:{port}", "its user may not do what the queue needs"),
        (f"redis://:{PASSWORD}@127.0.0.1:{{port}}/7", "DB index is out of range"),
        ("redis://no-such-host.invalid:1", "there is no such host"),
    ],
)
async def test_what_waiting_cannot_mend_is_refused_with_the_cause(guarded: int, url: str, problem: str) -> None:
    with pytest.raises(RedisRefused, match=problem) as refused:
        await connect_async(url.format(port=guarded), deadline_s=30)
    assert "pw-" not in str(refused.value)
    with pytest.raises(RedisRefused, match=problem):
        connect(url.format(port=guarded), deadline_s=30)


@pytest.mark.parametrize("parameter", ["ssl_ca_certs=/none", "ssl_cert_reqs=perhaps"])
async def test_a_parameter_of_tls_that_cannot_work_is_refused(guarded: int, parameter: str) -> None:
    with pytest.raises(RedisRefused, match=r"ssl_ parameters|perhaps"):
        await connect_async(f"rediss://127.0.0.1:{guarded}?{parameter}", deadline_s=30)


async def test_a_password_that_the_server_does_not_have_is_named(redis_server_without_password: str) -> None:
    with pytest.raises(RedisRefused, match="it has no password, and the address has one"):
        await connect_async(redis_server_without_password.replace("://", "://:pw@"), deadline_s=30)


@pytest.fixture
def redis_server_without_password(redis_url: str) -> str:
    return redis_url


class _Hello(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def test_a_web_server_is_no_redis() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Hello) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address[:2]
        with pytest.raises(RedisRefused, match="no Redis server"):
            await connect_async(f"redis://{host!s}:{port}", deadline_s=30)
        with pytest.raises(RedisRefused, match="does not speak TLS"):
            await connect_async(f"rediss://{host!s}:{port}", deadline_s=30)
        server.shutdown()


@pytest.mark.parametrize(
    "error",
    [
        BusyLoadingError("Redis is loading the dataset in memory"),
        ConnectionError("Error 111 connecting to 127.0.0.1:1. Connection refused."),
        ConnectionError("Connection closed by server."),
        redis.exceptions.TimeoutError("Timeout connecting to server"),
        redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        ResponseError("MISCONF Redis is configured to save RDB snapshots, but it is unable to persist to disk."),
        ResponseError("MASTERDOWN Link with MASTER is down"),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    ],
)
def test_what_may_mend_itself_is_waited_for(error: Exception) -> None:
    assert why_never(error) is None
    Patience("redis://h", 3600).after(error)


def test_waiting_ends_at_the_deadline_and_says_for_what_it_waited() -> None:
    with pytest.raises(ConnectionError, match=r"Redis at redis://h:1 did not answer for 0 s: Connection refused"):
        Patience("redis://:pw-secret@h:1", 0).after(ConnectionError("Connection refused"))


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ({"cluster_enabled": 1}, "is a cluster"),
        ({"role": "slave", "master_host": "a", "master_port": 1}, "read-only replica; give the address of its primary"),
    ],
)
def test_clusters_and_replicas_are_unsuitable(info: dict[str, object], problem: str) -> None:
    from miles.queue.client import check_server

    with pytest.raises(RedisUnsuitable, match=problem):
        check_server({"redis_version": "7.0.0", **info}, "redis://x")


def test_a_run_folder_with_odd_characters_has_a_server_too(tmp_path: pathlib.Path) -> None:
    from miles.queue import RedisServer

    with RedisServer(tmp_path / "50% done? #1 ünï") as server:
        assert connect(server.url).ping()

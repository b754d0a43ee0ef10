"""Clients that do not behave: slow, silent, many, and gone in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
import redis.asyncio
from gateway_stack import Stack, problem

from miles.gateway.connection import HEAD_BYTES
from miles.gateway.event_ring import PIECE_BYTES
from miles.rpc.gen import job_pb2
from miles.services.controller.jobs.store import JobStore

Submit = Callable[..., dict[str, Any]]

MANY = 200


def connect(stack: Stack, request: str, *, receive_bytes: int | None = None) -> socket.socket:
    """A connection on which a request was sent."""
    host, port = stack.local.address.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(180)
    connection.connect((host, int(port)))
    connection.sendall(request.replace("\n", "\r\n").encode())
    return connection


def watch_request(stack: Stack, job_id: str, after: str = "") -> str:
    host = stack.local.address.removeprefix("http://")
    last = f"Last-Event-ID: {after}\n" if after else ""
    return f"GET /v1/jobs/{job_id}/events HTTP/1.1\nHost: {host}\nConnection: close\n{last}\n"


async def write_lines(stack: Stack, job_id: str, first: int, count: int, text: str = "line {}") -> None:
    """Events of a run."""
    client = redis.asyncio.Redis.from_url(stack.redis.url)
    store = JobStore(client)
    for i in range(first, first + count):
        line = job_pb2.LogLine(level=job_pb2.LOG_LEVEL_INFO, source="test", text=text.format(i))
        await store.add_event(job_pb2.JobEvent(job_id=job_id, log=line))
    await client.aclose()


def read_all(connection: socket.socket) -> str:
    """What comes until the other side closes."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 20):
            pieces.append(piece)
    return b"".join(pieces).decode()


def resident_bytes(stack: Stack) -> int:
    assert stack.local.running is not None
    return int(psutil.Process(stack.local.running.pid).memory_info().rss)


@contextlib.contextmanager
def closing(connections: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


def test_a_job_reads_as_ended_once_its_stream_has(stack: Stack, http: httpx.Client, submit: Submit) -> None:
    submit(name="ahead")
    for name in ("one", "two", "three"):
        job_id = submit(name=name)["id"]
        with httpx.Client(base_url=stack.keyed.address, timeout=120) as other:
            headers = {"Authorization": f"Bearer {stack.keys['boss']}"}
            with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
                lines = stream.iter_lines()
                assert http.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"  # an answer to be kept
                # Through another gateway, so that the one that is asked learns of it by the stream alone.
                assert other.post(f"/v1/jobs/{job_id}/cancel", headers=headers).status_code == 202
                for line in lines:
                    if line == "event: end":
                        break
                assert http.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"
                assert http.get(f"/v1/jobs/{job_id}/status").json()["phase"] == "ended"


async def test_watchers_that_do_not_read_cost_a_bounded_piece_of_memory(
    stack: Stack, waiting_job: dict[str, Any]
) -> None:
    job_id, count, text = waiting_job["id"], 400, "x" * 20_000
    request = watch_request(stack, job_id)

    def slow(watchers: int) -> list[socket.socket]:
        return [connect(stack, request, receive_bytes=16_384) for _ in range(watchers)]

    await write_lines(stack, job_id, 0, 1)
    before = resident_bytes(stack)
    with contextlib.ExitStack() as cleaning:
        early = cleaning.enter_context(closing(await asyncio.to_thread(slow, 25)))
        await write_lines(stack, job_id, 0, count, text + " {}")  # 8 MB for each of them
        cleaning.enter_context(closing(await asyncio.to_thread(slow, 25)))
        (reader,) = cleaning.enter_context(closing([connect(stack, request)]))
        seen = ""
        while f"x {count - 1}" not in seen:
            seen = seen[-100:] + (await asyncio.to_thread(reader.recv, 1 << 20)).decode()
        # What each one keeps is in its connection; what all see is kept once.
        assert resident_bytes(stack) - before < 50 * 6 * PIECE_BYTES + (60 << 20)
        async with httpx.AsyncClient(base_url=stack.local.address, timeout=120) as client:
            assert (await client.post(f"/v1/jobs/{job_id}/cancel")).status_code == 202
        everything = await asyncio.to_thread(read_all, early[0])  # slow is not lost
    assert all(f'x {i}"' in everything for i in range(count))
    assert "event: end" in everything


async def test_many_watchers_come_back_with_their_last_event_and_miss_nothing(
    stack: Stack, waiting_job: dict[str, Any]
) -> None:
    job_id = waiting_job["id"]
    writing = asyncio.create_task(write_lines(stack, job_id, 0, 400))

    async def watch(place: int) -> list[str]:
        """Leave after some events, come back with the id of the last one, until the end."""
        found: list[str] = []
        last = ""
        while True:
            connection = await asyncio.open_connection(*stack.local.address.removeprefix("http://").split(":"))
            reader, writer = connection
            writer.write(watch_request(stack, job_id, last).replace("\n", "\r\n").encode())
            async for raw in reader:
                line = raw.decode().strip()
                if line.startswith("id: "):
                    pending = line.removeprefix("id: ")
                elif line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    if data["type"] == "end":
                        writer.close()
                        return found
                    last = pending
                    if data["type"] == "log" and data["source"] == "test":
                        found.append(data["text"])
                        if len(found) % (37 + place) == 0:
                            break
            writer.close()

    watchers = [asyncio.create_task(watch(place)) for place in range(50)]
    await writing
    async with httpx.AsyncClient(base_url=stack.local.address, timeout=120) as client:
        await client.post(f"/v1/jobs/{job_id}/cancel")
    async with asyncio.timeout(180):
        seen = await asyncio.gather(*watchers)
    assert seen == [[f"line {i}" for i in range(400)]] * 50


async def test_cancelling_a_job_ends_every_stream(stack: Stack, waiting_job: dict[str, Any]) -> None:
    job_id = waiting_job["id"]
    request = watch_request(stack, job_id)
    connections = [await asyncio.to_thread(connect, stack, request) for _ in range(MANY)]
    with closing(connections):
        for connection in connections:
            assert connection.recv(12) == b"HTTP/1.1 200"
        async with httpx.AsyncClient(base_url=stack.local.address, timeout=120) as client:
            assert (await client.post(f"/v1/jobs/{job_id}/cancel")).status_code == 202
            for connection in connections:
                text = await asyncio.to_thread(read_all, connection)
                assert '"state":"cancelled"' in text
                assert "event: end" in text
            async with asyncio.timeout(180):
                while "miles_gateway_watchers 0.0" not in (await client.get("/metrics")).text:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)


def test_idle_and_half_open_connections_keep_nobody_out(stack: Stack, http: httpx.Client) -> None:
    idle = [connect(stack, "") for _ in range(300)]
    halves = [connect(stack, "GET /v1/jobs HTTP/1.1\nHost: 127") for _ in range(100)]
    with closing(idle + halves):
        assert http.get("/healthz").status_code == 200
        assert http.get("/v1/jobs").status_code == 200


def test_a_head_without_end_is_refused(stack: Stack) -> None:
    connection = connect(stack, "GET /healthz HTTP/1.1\n")
    with closing([connection]):
        sent = 0
        while not select.select([connection], [], [], 0.002)[0]:
            sent += connection.send(b"a: " + b"b" * 995 + b"\r\n")
            assert sent < 8 * HEAD_BYTES
        answer = read_all(connection)
    assert answer.startswith("HTTP/1.1 431")
    assert "Content-Type: application/problem+json" in answer


@pytest.mark.parametrize("text", ["nonsense\n\n", "GET / HTTP/9.9\n\n", "GET /v1/jobs HTTP/1.1\nContent-Length: x\n\n"])
def test_what_is_not_http_gets_a_problem_document(stack: Stack, text: str) -> None:
    connection = connect(stack, text)
    with closing([connection]):
        answer = read_all(connection)
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 400")
    assert "Content-Type: application/problem+json" in head
    assert json.loads(body)["status"] == 400


def test_requests_of_one_connection_follow_each_other(stack: Stack) -> None:
    host = stack.local.address.removeprefix("http://")
    one = f"GET /healthz HTTP/1.1\nHost: {host}\n\n"
    connection = connect(stack, one * 3 + one.replace("\n\n", "\nConnection: close\n\n"))
    with closing([connection]):
        assert read_all(connection).count('{"status":"ok"}') == 4


async def test_a_stream_of_a_job_that_is_unknown_is_a_problem(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.local.address, timeout=120) as client:
        problem(await client.get("/v1/jobs/nothing-here/events"), "unknown-job")

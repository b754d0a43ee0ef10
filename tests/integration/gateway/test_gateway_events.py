"""Event streams: whole, resumable, shared."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import redis.asyncio
from gateway_stack import Stack

from miles.client import MilesClient
from miles.client.events import parse_events
from miles.gateway.feeds import PAGE, RING
from miles.rpc.gen import job_pb2
from miles.services.controller.jobs.store import JobStore

Submit = Callable[..., dict[str, Any]]


def history(stack: Stack, job_id: str, **headers: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Events of a job as (id, name, data), without waiting for more."""
    url = f"{stack.local.address}/v1/jobs/{job_id}/events"
    answer = httpx.get(url, params={"follow": False}, headers=headers, timeout=120)
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [(event.id, event.event, json.loads(event.data)) for event in parse_events(answer.text.split("\n"))]


async def write_log_lines(stack: Stack, job_id: str, first: int, count: int) -> None:
    """What a run does while it goes on."""
    client = redis.asyncio.Redis.from_url(stack.redis.url)
    store = JobStore(client)
    for i in range(first, first + count):
        line = job_pb2.LogLine(level=job_pb2.LOG_LEVEL_INFO, source="test", text=f"line {i}")
        await store.add_event(job_pb2.JobEvent(job_id=job_id, log=line))
    await client.aclose()


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once a condition holds."""
    async with asyncio.timeout(180):
        while not await condition():  # noqa: ASYNC110 - another process is what changes
            await asyncio.sleep(0.2)


async def _now(value: bool) -> bool:
    return value


def lines_of(events: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    return [data["text"] for _, name, data in events if name == "log" and data["source"] == "test"]


async def test_a_stream_can_be_resumed_anywhere(stack: Stack, waiting_job: dict[str, Any]) -> None:
    job_id = waiting_job["id"]
    await write_log_lines(stack, job_id, 0, 20)
    everything = await asyncio.to_thread(history, stack, job_id)
    assert lines_of(everything) == [f"line {i}" for i in range(20)]
    middle = everything[11][0]
    rest = await asyncio.to_thread(history, stack, job_id, **{"Last-Event-ID": middle})
    assert rest == everything[12:]


async def test_a_history_longer_than_what_is_at_hand_is_complete(stack: Stack, waiting_job: dict[str, Any]) -> None:
    job_id, count = waiting_job["id"], RING + 2 * PAGE + 7
    await write_log_lines(stack, job_id, 0, count)
    for _ in range(2):  # first with a feed that has just begun, then with one that is at its end
        everything = await asyncio.to_thread(history, stack, job_id)
        assert lines_of(everything) == [f"line {i}" for i in range(count)]


def test_the_stream_of_an_ended_job_ends(stack: Stack, http: httpx.Client, waiting_job: dict[str, Any]) -> None:
    path = f"/v1/jobs/{waiting_job['id']}"
    http.post(f"{path}/cancel")
    answer = http.get(f"{path}/events")
    events = list(parse_events(answer.text.split("\n")))
    assert events[-1].event == "end"
    assert json.loads(events[-2].data)["state"] == "cancelled"
    last = events[-2].id
    again = http.get(f"{path}/events", headers={"Last-Event-ID": last})
    assert again.text == 'event: end\ndata: {"type":"end"}\n\n'


async def test_many_watchers_see_the_same_while_the_job_is_followed_once(
    stack: Stack, http: httpx.Client, waiting_job: dict[str, Any]
) -> None:
    job_id = waiting_job["id"]
    await write_log_lines(stack, job_id, 0, 3)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=stack.local.address, timeout=180, limits=limits) as client:

        async def watch() -> list[str]:
            found: list[str] = []
            async with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
                lines = [line async for line in answer.aiter_lines()]
            for event in parse_events(lines):
                found += [json.loads(event.data)["text"]] if event.event == "log" else []
            return found

        watchers = [asyncio.create_task(watch()) for _ in range(60)]

        async def all_watch() -> bool:
            return "miles_gateway_watchers 60.0" in (await client.get("/metrics")).text

        await eventually(all_watch)
        blocked = redis.asyncio.Redis.from_url(stack.redis.url)
        readers = [c for c in await blocked.client_list() if c["cmd"] == "xread"]
        assert len([c for c in readers if int(c["idle"]) < 5]) <= 3  # one for each job that somebody watches
        await blocked.aclose()
        await write_log_lines(stack, job_id, 3, 5)
        await client.post(f"/v1/jobs/{job_id}/cancel")
        seen = await asyncio.gather(*watchers)
    assert all([text for text in lines if text.startswith("line")] == [f"line {i}" for i in range(8)] for lines in seen)


async def test_a_watcher_goes_on_when_the_controller_restarts(stack: Stack, waiting_job: dict[str, Any]) -> None:
    job_id = waiting_job["id"]
    seen: list[str] = []

    def watch() -> None:
        with MilesClient(stack.local.address) as client:
            for event in client.watch(job_id):
                if event["type"] == "log":
                    seen.append(event["text"])

    watching = asyncio.create_task(asyncio.to_thread(watch))
    await write_log_lines(stack, job_id, 0, 3)
    await eventually(lambda: _now(len(seen) >= 3))
    await asyncio.to_thread(stack.controller.stop, signal.SIGKILL)
    await write_log_lines(stack, job_id, 3, 3)
    await asyncio.to_thread(stack.controller.start)
    await eventually(lambda: _now(len(seen) >= 6))
    with MilesClient(stack.local.address) as client:
        client.cancel(job_id)
    await asyncio.wait_for(watching, 30)
    assert [text for text in seen if text.startswith("line")] == [f"line {i}" for i in range(6)]


def test_the_history_of_a_resumed_job_is_whole(stack: Stack, http: httpx.Client, waiting_job: dict[str, Any]) -> None:
    path = f"/v1/jobs/{waiting_job['id']}"
    for action in ("stop", "resume", "stop", "resume", "cancel"):
        assert http.post(f"{path}/{action}").status_code == 202
    states = [data["state"] for _, name, data in history(stack, waiting_job["id"]) if name == "state"]
    assert states == ["stopped", "queued", "stopped", "queued", "cancelled"]


def test_an_event_id_must_look_like_one(http: httpx.Client, waiting_job: dict[str, Any]) -> None:
    path = f"/v1/jobs/{waiting_job['id']}/events"
    assert http.get(path, headers={"Last-Event-ID": "x"}).status_code == 422
    assert http.get(path, params={"after": "1-"}).status_code == 422

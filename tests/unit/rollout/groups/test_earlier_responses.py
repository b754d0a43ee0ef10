from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from miles.queue import Holder, ResponseStore, connect_async
from miles.services.rollout.groups.earlier_responses import EarlierResponses, PromptDrafts
from miles.types import Sample, SampleStatus

PROMPT = np.array([5, 6, 7], np.int32)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    connected = await connect_async(redis_url)
    yield connected
    await connected.aclose()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port whose server takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def unreachable(port: int) -> redis.asyncio.Redis:
    return redis.asyncio.Redis(port=port, retry=Retry(NoBackoff(), 0), socket_timeout=60)


def sample(index: int, *response: int, status: SampleStatus = SampleStatus.COMPLETED) -> Sample:
    tokens = np.concatenate([PROMPT, np.array(response, np.int32)])
    return Sample(
        group_id=1, index=index, prompt="p", tokens=tokens, response_length=len(response), response="r", status=status
    )


async def until_found(earlier: EarlierResponses, prompt: npt.NDArray[np.int32]) -> list[list[int]]:
    """What is kept to a prompt, once there is something."""
    async with asyncio.timeout(60):
        while not (found := await earlier.of_prompt(prompt)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return [response.tolist() for response in found]


async def test_responses_that_ended_are_drafts_for_every_worker(client: redis.asyncio.Redis, job_id: str) -> None:
    one, other = (EarlierResponses(ResponseStore(client, job_id, per_prompt=4)) for _ in range(2))
    ended = [sample(0, 1, 2), sample(1, 3, status=SampleStatus.TRUNCATED), sample(2, 4, status=SampleStatus.FAILED)]
    assert await other.of_prompt(PROMPT) == []
    one.keep(PROMPT, ended, Holder("rollout-0", 1))
    assert await until_found(other, PROMPT) == [[3], [1, 2]]
    assert other.found == 1
    assert other.missed >= 1
    assert (one.found, one.missed) == (0, 0)
    await one.close()


async def test_what_a_function_made_of_the_prompt_is_found_under_the_prompt_of_the_lease(
    client: redis.asyncio.Redis, job_id: str
) -> None:
    earlier = EarlierResponses(ResponseStore(client, job_id, per_prompt=4))
    leased = np.array([8], np.int32)
    earlier.keep(leased, [sample(0, 1, 2)], None)
    assert await until_found(earlier, leased) == [[1, 2]]


async def test_a_store_that_is_away_costs_drafts_and_nothing_else(
    job_id: str, silent_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with contextlib.AsyncExitStack() as stack:
        for port, deadline_s in ((1, 60.0), (silent_port, 0.1)):
            client = await stack.enter_async_context(unreachable(port))
            store = ResponseStore(client, job_id, per_prompt=4)
            earlier = EarlierResponses(store, read_deadline_s=deadline_s, add_deadline_s=deadline_s)
            assert await earlier.of_prompt(PROMPT) == ()
            assert (earlier.found, earlier.missed) == (0, 1)
            before = len(caplog.records)
            earlier.keep(PROMPT, [sample(0, 1)], None)
            async with asyncio.timeout(60):
                while len(caplog.records) == before:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await earlier.close()
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "earlier responses could not be read",
        "responses could not be kept as drafts",
    ] * 2
    assert "no answer in time" in caplog.records[-1].message


async def test_the_requests_of_a_group_share_one_reading_also_when_one_of_them_is_cancelled(
    client: redis.asyncio.Redis, job_id: str
) -> None:
    store = ResponseStore(client, job_id, per_prompt=4)
    await store.add(PROMPT, [np.array([1, 2], np.int32)])
    earlier = EarlierResponses(store)
    drafts = PromptDrafts(earlier, PROMPT)
    tasks = [asyncio.create_task(drafts.get()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    first, second = await asyncio.gather(*tasks[1:])
    assert [response.tolist() for response in first] == [[1, 2]]
    assert first is second is await drafts.get()
    assert earlier.found == 1

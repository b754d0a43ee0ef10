"""A client knows which service its samples wait for, and why."""

from __future__ import annotations

import asyncio
import socket

from miles.reward_sdk.client import RewardClient, ServiceWait
from miles.types import Sample


async def failing(client: RewardClient) -> ServiceWait:
    """Wait until a failure is known."""
    async with asyncio.timeout(60.0):
        while True:
            if (waits := client.waits()) and waits[0].error:
                return waits[0]
            await asyncio.sleep(0.05)


async def test_a_service_that_cannot_be_reached_is_known_long_before_the_call_gives_up() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    samples = [Sample(group_id=0, index=index, prompt="a") for index in range(3)]
    async with RewardClient({"default": address, "mine": address}, timeout_s=600.0) as client:
        assert client.waits() == []
        scoring = asyncio.create_task(client.score(samples))
        wait = await failing(client)
        scoring.cancel()
        await asyncio.gather(scoring, return_exceptions=True)
        assert client.waits() == []
    assert (wait.service, wait.samples) == (f"reward service 'mine' at {address}", 3)
    assert "it cannot be reached" in wait.error

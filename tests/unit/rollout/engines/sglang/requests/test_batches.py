from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import pytest

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.requests.batches import MOST, Batches, merged


class Server:
    """Answers each request of a batch with as many events as it has input tokens."""

    def __init__(self) -> None:
        self.bodies: list[Mapping[str, Any]] = []
        self.takes = asyncio.Event()
        self.takes.set()
        self.error: Exception | None = None
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.aborted: list[str] = []
        self.looks = asyncio.Event()
        self.looks.set()
        self.refused: list[int] = []
        """Input that it refuses, with this error."""
        self.refusal: Exception = ValueError()

    async def send(
        self, body: Mapping[str, Any], on_accepted: Callable[[], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        self.bodies.append(body)
        await self.takes.wait()
        single = isinstance(body["rid"], str)
        inputs = [body["input_ids"]] if single else body["input_ids"]
        on_accepted()  # the real one, too, begins its answer before it looks at the requests
        await self.looks.wait()
        if self.refused in inputs:
            raise self.refusal
        for count in range(max(map(len, inputs))):
            await self.goes_on.wait()
            for index, ids in enumerate(inputs):
                if count < len(ids):
                    finish = {"type": "stop"} if count == len(ids) - 1 else None
                    event = {"output_ids": [ids[count]], "meta_info": {"finish_reason": finish}}
                    yield event if single else event | {"index": index}
            if self.error is not None:
                raise self.error

    async def abort(self, rid: str) -> None:
        self.aborted.append(rid)


def payload(rid: str, ids: list[int], **more: Any) -> dict[str, Any]:
    return {"rid": rid, "input_ids": ids, "sampling_params": {"n": rid}, "extra_key": "v0", "stream": True, **more}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def batches(server: Server) -> Batches:
    return Batches(server.send, server.abort)


async def tokens(batches: Batches, group: str, body: dict[str, Any]) -> list[int]:
    return [event["output_ids"][0] async for event in batches.generate(group, body)]


async def test_a_group_is_one_post_and_each_gets_its_own_events(batches: Batches, server: Server) -> None:
    asked = [payload(f"r{i}", list(range(10 * i, 11 * i + 1))) for i in range(8)]
    found = await asyncio.gather(*(tokens(batches, "g", body) for body in asked))
    assert found == [body["input_ids"] for body in asked]
    assert [body["rid"] for body in server.bodies] == [[f"r{i}" for i in range(8)]]
    assert server.bodies[0]["sampling_params"] == [{"n": f"r{i}"} for i in range(8)]
    assert server.bodies[0]["stream"] is True


async def test_groups_of_a_moment_share_a_post_and_what_differs_in_kind_or_comes_later_goes_apart(
    batches: Batches, server: Server
) -> None:
    kinds = [("g", {}), ("h", {}), ("g", {"routed_experts_start_len": 3}), ("", {}), ("", {})]
    asked = [(group, payload(f"r{i}", [i], **more)) for i, (group, more) in enumerate(kinds)]
    assert await asyncio.gather(*(tokens(batches, *each) for each in asked)) == [[i] for i in range(5)]
    assert await tokens(batches, "g", payload("r5", [5])) == [5]
    assert [body["rid"] for body in server.bodies] == [["r0", "r1", "r3", "r4"], "r2", "r5"]


@pytest.mark.parametrize("refusal", [ValueError("too long"), ServerRefused("/generate", 400, "too long")])
async def test_a_request_that_the_server_refuses_ends_its_own_group_alone(
    batches: Batches, server: Server, refusal: Exception
) -> None:
    server.refused, server.refusal = [99], refusal
    asked = [("g", [1]), ("g", [2]), ("h", [99]), ("h", [3]), ("", [4])]
    outcomes = await asyncio.gather(
        *(tokens(batches, group, payload(f"r{i}", ids)) for i, (group, ids) in enumerate(asked)),
        return_exceptions=True,
    )
    assert outcomes == [[1], [2], refusal, refusal, [4]]
    assert [body["rid"] for body in server.bodies] == [
        [f"r{i}" for i in range(5)],
        ["r0-again", "r1-again"],
        ["r2-again", "r3-again"],
        "r4-again",
    ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_an_abort_reaches_a_request_that_is_sent_again(batches: Batches, server: Server) -> None:
    server.refused, server.refusal = [99], ValueError("too long")
    server.looks.clear()
    requests = [("g", payload("r1", [1])), ("h", payload("r99", [99]))]
    asked = [asyncio.create_task(tokens(batches, *each)) for each in requests]
    await until(lambda: bool(server.bodies))
    await batches.abort("r1")  # the server has the first POST, and has not refused it yet
    assert server.aborted == ["r1"]
    server.looks.set()
    assert await asked[0] == [1]
    await until(lambda: server.aborted == ["r1", "r1-again"])
    with pytest.raises(ValueError, match="too long"):
        await asked[1]


async def test_an_abort_waits_until_a_request_that_is_sent_again_is_there(batches: Batches, server: Server) -> None:
    server.refused, server.refusal = [99], ValueError("too long")
    requests = [("g", payload("r1", [1])), ("h", payload("r99", [99]))]
    asked = [asyncio.create_task(tokens(batches, *each)) for each in requests]
    await until(lambda: bool(server.bodies))
    server.takes.clear()
    await until(lambda: len(server.bodies) == 3)
    aborting = asyncio.create_task(batches.abort("r1"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert server.aborted == []
    server.takes.set()
    await asyncio.wait_for(aborting, 30)
    assert "r1-again" in server.aborted
    await asyncio.gather(*asked, return_exceptions=True)


async def test_a_refusal_after_the_first_events_fails_what_has_begun_and_sends_the_rest_again(
    batches: Batches, server: Server
) -> None:
    server.error = ValueError("too long")
    asked = [("g", [1]), ("g", [2, 3]), ("h", [4])]
    outcomes = await asyncio.gather(
        *(tokens(batches, group, payload(f"r{i}", ids)) for i, (group, ids) in enumerate(asked)),
        return_exceptions=True,
    )
    assert outcomes[0] == [1]  # it had ended
    assert isinstance(outcomes[1], EngineFailed)
    assert outcomes[2] == [4]


async def test_no_batch_is_larger_than_it_may_be(batches: Batches, server: Server) -> None:
    await asyncio.gather(*(tokens(batches, "g", payload(f"r{i}", [i])) for i in range(MOST + 2)))
    assert [len(body["rid"]) for body in server.bodies] == [MOST, 2]


async def test_an_error_ends_all_that_have_not_ended(batches: Batches, server: Server) -> None:
    server.error = EngineFailed("lost")
    short, long = payload("short", [1]), payload("long", [1, 2])
    outcomes = await asyncio.gather(*(tokens(batches, "g", body) for body in (short, long)), return_exceptions=True)
    assert outcomes[0] == [1]
    assert isinstance(outcomes[1], EngineFailed)


async def test_an_abort_can_wait_until_the_server_has_the_request(batches: Batches, server: Server) -> None:
    server.takes.clear()
    asked = [asyncio.create_task(tokens(batches, "g", payload(f"r{i}", [i]))) for i in range(2)]
    await asyncio.sleep(0)
    accepted = asyncio.create_task(batches.abort("r1"))
    while not server.bodies:  # noqa: ASYNC110
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not accepted.done()
    server.takes.set()
    await asyncio.wait_for(accepted, 10)
    assert await asyncio.gather(*asked) == [[0], [1]]
    await asyncio.wait_for(batches.abort("r0"), 10)


async def test_no_abort_waits_for_a_request_whose_server_is_lost(batches: Batches, server: Server) -> None:
    server.takes.clear()
    asked = asyncio.create_task(tokens(batches, "g", payload("r", [1])))
    await asyncio.sleep(0)
    accepted = asyncio.create_task(batches.abort("r"))
    while not server.bodies:  # noqa: ASYNC110
        await asyncio.sleep(0)
    batches.close()
    await asyncio.wait_for(accepted, 10)
    assert await asked == []


async def test_nobody_waits_for_a_batch_that_is_given_up_before_it_begins(batches: Batches, server: Server) -> None:
    waiting = [asyncio.create_task(tokens(batches, "g", payload(f"r{i}", [1]))) for i in range(MOST)]
    await asyncio.sleep(0)  # the last one makes the batch
    batches.close()
    async with asyncio.timeout(10):
        assert await asyncio.gather(*waiting) == [[]] * MOST
    assert server.bodies == []


def test_one_request_is_sent_as_it_is() -> None:
    body = payload("r", [1])
    assert merged([body]) is body


def test_what_all_requests_share_is_sent_once() -> None:
    bodies = [payload(f"r{i}", [i]) | {"sampling_params": {"temperature": 1.0}} for i in range(3)]
    body = merged(bodies)
    assert (body["sampling_params"], body["extra_key"]) == ({"temperature": 1.0}, "v0")
    assert (body["rid"], body["input_ids"]) == (["r0", "r1", "r2"], [[0], [1], [2]])
    bodies[2]["sampling_params"] = {"temperature": 0.5}
    assert [params["temperature"] for params in merged(bodies)["sampling_params"]] == [1.0, 1.0, 0.5]

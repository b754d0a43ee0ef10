"""A server's supervisor against a real HTTP server that answers as SGLang's front process does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from miles.change_signal import ChangeSignal
from miles.precision.recipe import Recipe
from miles.services.rollout.engines.sglang import SglangOptions
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.server import replica
from miles.services.rollout.engines.sglang.server.flags import DRAIN
from miles.services.rollout.engines.sglang.server.group import ServerGroup
from miles.services.rollout.engines.sglang.server.http_api import SglangApi
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.weights.loader import WeightLoader

DEADLINE_S = 20.0


class Front:
    """Answers probes; `at` is when its scheduler last did something."""

    def __init__(self) -> None:
        self.at = 0.0
        self.address = ""
        self.resets = self.checks = 0
        self.probed_s = asyncio.Queue[float]()
        """When it was probed, in seconds of the monotonic clock."""
        self.called: list[str] = []
        """Calls that pause and resume its scheduler."""

    async def control(self, request: web.Request) -> web.Response:
        self.called.append(request.path)
        return web.json_response({})

    async def update(self, request: web.Request) -> web.Response:
        given = await request.json()
        self.called += [request.path, *filter(None, (given.get("load_format"), given.get("selector")))]
        return web.json_response({"success": True})

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response({"tp_size": 4})

    async def loads(self, request: web.Request) -> web.Response:
        self.probed_s.put_nowait(time.monotonic())
        return web.json_response({"loads": [{"timestamp": self.at, "token_usage": 0.1, "num_running_reqs": 1}]})

    async def check(self, request: web.Request) -> web.Response:
        self.checks += 1
        if (await request.json())["action"] == "reset_tensors":
            self.resets += 1
            if self.resets == 2:
                return web.json_response({"success": False, "message": "not now"}, status=500)
        return web.json_response({"per_engine_checksum": "c", "ranks": []})


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    made = Front()
    app = web.Application()
    app.router.add_get("/server_info", made.info)
    app.router.add_get("/v1/loads", made.loads)
    app.router.add_post("/pause_generation", made.control)
    app.router.add_post("/continue_generation", made.control)
    app.router.add_post("/weights_checker", made.check)
    for path in ("/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"):
        app.router.add_post(path, made.update)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    made.address = f"{host}:{port}"
    yield made
    await runner.cleanup()


class Attached:
    """A replica, and what it said."""

    def __init__(self, front: Front, **options: float) -> None:
        self.errors: list[Exception] = []
        self.ready = asyncio.Queue[Replica]()
        servers: Any = {"hf_checkpoint": "m", "device": "cpu", "addresses": (front.address,), **options}
        self.replica = Replica(SglangOptions(**servers), 0, self.on_ready, lambda: None)

    async def on_ready(self, which: Replica) -> None:
        if self.errors:
            raise self.errors.pop()
        self.ready.put_nowait(which)


async def test_a_server_is_looked_after_whatever_goes_wrong_with_it(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "_FIRST_RESTART_S", 0.01)
    attached = Attached(front)
    await attached.replica.start()
    assert attached.replica.ranks == 4
    attached.errors = [OSError("no space left"), ValueError("odd weights")]
    attached.replica.mark_lost("it was asked to")
    async with asyncio.timeout(DEADLINE_S):
        assert await attached.ready.get() is attached.replica
    assert attached.replica.up
    await attached.replica.close()


async def test_a_scheduler_that_does_nothing_for_its_requests_is_noticed_behind_a_front_that_answers(
    front: Front,
) -> None:
    attached = Attached(front, hang_timeout_s=0.5, probe_interval_s=0.05)
    await attached.replica.start()
    await asyncio.sleep(1.0)
    assert attached.ready.empty(), "it has no requests"
    attached.replica.running = 1
    await attached.replica.pause("in_place")
    await asyncio.sleep(1.0)
    assert attached.ready.empty(), "it stands still because it was told to"
    await attached.replica.resume()
    for _ in range(20):
        front.at += 1
        await asyncio.sleep(0.05)
    assert attached.ready.empty(), "it is at work"
    async with asyncio.timeout(DEADLINE_S):
        await attached.ready.get()
    await attached.replica.close()


async def test_a_server_is_probed_as_often_as_asked_and_not_before(front: Front) -> None:
    attached = Attached(front, probe_interval_s=0.1, first_probe_s=0.4)
    began = time.monotonic()
    await attached.replica.start()
    async with asyncio.timeout(DEADLINE_S):
        first, second = [await front.probed_s.get() for _ in range(2)]
    await attached.replica.close()
    assert first - began >= 0.5
    assert second > first


def test_no_two_loads_share_a_key_of_the_cache_even_when_their_numbers_are_equal() -> None:
    server = Replica(SglangOptions(hf_checkpoint="m", device="cpu"), 0, lambda _: asyncio.sleep(0), lambda: None)
    keys = []
    for version in (1, 2, 1, 1):
        server.hold(version)
        keys.append(server.cache_key)
    assert len(set(keys)) == 4


def test_only_a_server_of_this_service_without_requests_is_known_to_hold_none() -> None:
    def replica_of(**options: Any) -> Replica:
        given = SglangOptions(hf_checkpoint="m", device="cpu", **options)
        return Replica(given, 0, lambda _: asyncio.sleep(0), lambda: None)

    managed, shared = replica_of(), replica_of(addresses=("127.0.0.1:1",))
    assert managed.holds_no_requests
    assert not shared.holds_no_requests
    managed.running = 1
    assert not managed.holds_no_requests


@contextlib.asynccontextmanager
async def managed(front: Front, **options: Any) -> AsyncIterator[Replica]:
    """A server of this service, which is not started here but answers."""
    given: dict[str, Any] = {"hf_checkpoint": "m", "device": "cpu", **options}
    made = Replica(SglangOptions(**given), 0, lambda _: asyncio.sleep(0), list)
    made.api = SglangApi(front.address)
    await made.api.open()
    yield made
    await made.api.close()


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_a_scheduler_without_requests_is_not_told_to_pause(front: Front, mode: str) -> None:
    async with managed(front) as server:
        await server.pause(mode)
        await server.resume()
        assert not front.called
        server.running = 1
        await server.pause(mode)
        server.running = 0
        await server.resume()
        assert front.called == ["/pause_generation", "/continue_generation"]
        await server.pause(mode)
        await server.resume()
        assert len(front.called) == 2


async def test_a_scheduler_is_told_to_pause_where_its_memory_is_taken_or_it_may_compute_without_requests(
    front: Front,
) -> None:
    async with managed(front) as server:
        await server.pause("in_place")
        await server.pause("retract", always=True)
        await server.pause("retract")  # it is paused: what it is told of is told again
        await server.resume()
        await server.resume()
        assert front.called == ["/pause_generation", "/pause_generation", "/continue_generation"]
    front.called.clear()
    async with managed(front, server_flags={"speculative_algorithm": "NGRAM"}) as server:
        await server.pause("retract")
        await server.resume()
        assert front.called == ["/pause_generation", "/continue_generation"]
    front.called.clear()
    attached = Attached(front)
    await attached.replica.start()
    await attached.replica.pause("retract")
    await attached.replica.resume()
    await attached.replica.close()
    assert front.called == ["/pause_generation", "/continue_generation"], "others may have requests there"


@pytest.mark.parametrize("path", ["tensor", "disk"])
async def test_a_pause_of_a_server_of_fp8_weights_waits_for_its_gpu_without_a_checksum(front: Front, path: str) -> None:
    session = [
        *("/begin_weight_update", "draft"),
        *("/update_weights_from_tensor", DRAIN, "target"),
        "/end_weight_update",
    ]
    async with managed(front, device="cuda", recipe=Recipe(format="fp8_block"), weight_path=path) as server:
        server.running = 1
        for mode in ("in_place", "retract"):
            front.called.clear()
            await server.pause(mode)
            assert front.called == ["/pause_generation", *session]
        front.called.clear()
        await server.pause("in_place", updates=True)
        assert front.called == ["/pause_generation", *(session if path == "disk" else ())]
    assert not front.checks


async def test_a_pause_of_another_server_waits_by_a_checksum_of_nothing(front: Front) -> None:
    async with managed(front, device="cuda") as server:
        server.running = 1
        await server.pause("in_place")
        await server.pause("in_place", updates=True)
        assert front.called == ["/pause_generation"] * 2
    assert front.checks == 2


async def test_no_server_serves_the_noise_of_a_check_that_was_not_finished(front: Front) -> None:
    ready = asyncio.Queue[Replica]()
    options = SglangOptions(hf_checkpoint="m", device="cpu", addresses=(front.address,) * 2)
    replicas = [Replica(options, i, ready.put, lambda: None) for i in range(2)]
    for server in replicas:
        await server.start()
        server.hold(3)
    with pytest.raises(ServerRefused, match="not now"):
        await WeightLoader(options, ServerGroup(replicas, ChangeSignal(), 5.0)).verify()
    assert [server.version for server in replicas] == [None, None]
    async with asyncio.timeout(DEADLINE_S):
        assert {(await ready.get()).index for _ in replicas} == {0, 1}
    for server in replicas:
        await server.close()

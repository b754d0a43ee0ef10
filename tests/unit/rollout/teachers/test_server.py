"""Attempts, refusals and limits of calls to a teacher's server, over real HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from miles.services.rollout.teachers import server as server_module
from miles.services.rollout.teachers.server import TeacherFailed, TeacherRefused, TeacherServer, generation_url

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def teacher(handler: Handler, patience_s: float = 60.0, key: str | None = None) -> AsyncIterator[TeacherServer]:
    """A server that answers by `handler`, and what asks it."""
    app = web.Application()
    app.router.add_post("/generate", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    asked = TeacherServer("math", f"http://127.0.0.1:{port}", key, patience_s)
    await asked.open()
    try:
        yield asked
    finally:
        await asked.close()
        await runner.cleanup()


@pytest.mark.parametrize("status", [503, 429])
async def test_a_server_that_cannot_answer_now_is_asked_again_with_the_key(status: int) -> None:
    seen: list[tuple[object, str | None]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((await request.json(), request.headers.get("Authorization")))
        return web.json_response({"fine": 1}) if len(seen) > 1 else web.Response(status=status, text="busy")

    async with teacher(handler, key="k") as asked:
        assert await asked.generate({"a": [1]}) == {"fine": 1}
        assert asked.wait is None
    assert seen == [({"a": [1]}, "Bearer k")] * 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: web.Response(status=400, text="too long"), "with 400: too long"),
        (lambda: web.Response(status=307, headers={"Location": "/elsewhere"}), "with 307"),
        (lambda: web.Response(text="hello"), "with no JSON: hello"),
        (lambda: web.json_response([1]), "a JSON list instead of an object"),
    ],
)
async def test_refusals_and_nonsense_are_not_repeated(answer: Callable[[], web.Response], said: str) -> None:
    calls = []

    async def handler(request: web.Request) -> web.Response:
        calls.append(1)
        return answer()

    async with teacher(handler) as asked:
        with pytest.raises(TeacherRefused, match=said):
            await asked.generate({})
    assert calls == [1]


async def test_patience_ends_with_the_last_error() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=500, text="no memory")

    async with teacher(handler, patience_s=0.1) as asked:
        with pytest.raises(
            TeacherFailed, match=r"did not answer for 0\.1 s: ConnectionError: it answered 500: no memory"
        ):
            await asked.generate({})


async def test_an_answer_is_not_taken_in_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_ANSWER_BYTES", 1000)

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * 2000)

    async with teacher(handler) as asked:
        with pytest.raises(TeacherRefused, match="more than"):
            await asked.generate({})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://h:1", "http://h:1/generate"),
        ("https://h:1/", "https://h:1/generate"),
        ("http://h:1/generate", "http://h:1/generate"),
        ("http://h/teachers/generate/", "http://h/teachers/generate"),
    ],
)
def test_a_server_is_named_by_its_own_url_or_that_of_generations(given: str, expected: str) -> None:
    assert generation_url(given) == expected

"""Corpora of earlier responses against a real HTTP server that takes and refuses them as SGLang does."""

from __future__ import annotations

import asyncio
import logging
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from aiohttp import web
from toy_tokenizer import save_tokenizer

from miles.data.errors import DataError
from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.sglang import SglangOptions
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.speculative import corpora
from miles.services.rollout.engines.sglang.speculative.corpora import ResponseCorpora

DEADLINE_S = 60.0


class Server:
    """Holds corpora by id, within a number of documents."""

    def __init__(self) -> None:
        self.held: dict[str, list[str]] = {}
        self.most = 100
        self.answers = True
        self.broken = False
        self.changed = asyncio.Event()

    async def add(self, request: web.Request) -> web.Response:
        given = await request.json()
        if sum(map(len, self.held.values())) + len(given["documents"]) > self.most:
            return web.json_response({"success": False, "message": "exceeds the remaining token budget"}, status=400)
        self.held[given["corpus_id"]] = given["documents"]
        self.changed.set()
        if not self.answers:
            assert request.transport is not None
            request.transport.close()
        if self.broken:
            self.broken = False
            return web.Response(text="{")
        return web.json_response({"success": True, "corpus_id": given["corpus_id"]})

    async def remove(self, request: web.Request) -> web.Response:
        if self.held.pop((await request.json())["corpus_id"], None) is None:
            return web.json_response({"success": False, "message": "no such corpus"}, status=400)
        self.changed.set()
        return web.json_response({"success": True})

    async def answer(self, request: web.Request) -> web.Response:
        return web.json_response({"loads": []})

    def texts(self) -> list[list[str]]:
        """What the corpora hold, without the spaces that the tokenizer puts between its tokens."""
        return [[document.replace(" ", "") for document in documents] for documents in self.held.values()]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    made = Server()
    app = web.Application()
    app.router.add_post("/add_external_corpus", made.add)
    app.router.add_post("/remove_external_corpus", made.remove)
    app.router.add_get("/server_info", made.answer)
    app.router.add_get("/v1/loads", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    yield made, f"{host}:{port}"
    await runner.cleanup()


@pytest_asyncio.fixture
async def replica(server: tuple[Server, str]) -> AsyncIterator[Replica]:
    async def on_ready(which: Replica) -> None:
        pass

    options: dict[str, Any] = {"hf_checkpoint": "m", "device": "cpu", "addresses": (server[1],)}
    started = Replica(SglangOptions(**options), 0, on_ready, lambda: None)
    await started.start()
    yield started
    await started.close()


def request(group: str, prompt: str, *responses: str, resumed: str = "") -> GenerationRequest:
    return GenerationRequest(
        f"request-{group}",
        tokens(prompt + resumed).tolist(),
        SamplingParams(8),
        resumed_tokens=len(resumed),
        group=group,
        earlier_responses=[tokens(response) for response in responses],
    )


def tokens(text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray([ord(character) - 32 for character in text], np.int32)


def made(folder: pathlib.Path, replica: Replica) -> ResponseCorpora:
    save_tokenizer(folder, None)
    return ResponseCorpora("rollout-0", str(folder), [replica], max_tokens=1000, timeout_s=DEADLINE_S)


async def test_a_new_corpus_takes_the_place_of_the_last_one(
    tmp_path: pathlib.Path, replica: Replica, server: tuple[Server, str]
) -> None:
    kept, (held, _) = made(tmp_path, replica), server
    kept.offer(request("g0", "1+1=", "two", "2"))
    kept.offer(request("g1", "plain"))
    await kept.load()
    assert held.texts() == [["1+1=2", "1+1=two"]]
    kept.offer(request("g2", "2+2=", "4", resumed="fo"))
    await kept.load()
    assert held.texts() == [["1+1=2", "1+1=two", "2+2=4"]]


async def test_what_a_server_refuses_is_a_warning_and_makes_room_for_the_next(
    tmp_path: pathlib.Path, replica: Replica, server: tuple[Server, str], caplog: pytest.LogCaptureFixture
) -> None:
    kept, (held, _) = made(tmp_path, replica), server
    kept.offer(request("g0", "1+1=", "2"))
    await kept.load()
    held.most = 1
    with caplog.at_level(logging.WARNING):
        await kept.load()
    assert "drafts without the newest earlier responses" in caplog.text
    assert list(held.held) == ["rollout-0-1"]
    await kept.load()
    assert list(held.held) == ["rollout-0-3"]


async def test_a_corpus_that_went_in_although_the_call_failed_is_removed(
    tmp_path: pathlib.Path, replica: Replica, server: tuple[Server, str], caplog: pytest.LogCaptureFixture
) -> None:
    kept, (held, _) = made(tmp_path, replica), server
    kept.offer(request("g0", "1+1=", "2"))
    await kept.load()
    held.answers = False
    await kept.load()
    assert list(held.held) == ["rollout-0-1", "rollout-0-2"]
    held.answers, held.most = True, 2
    caplog.clear()
    for number in (3, 4):
        await kept.load()
        assert list(held.held) == [f"rollout-0-{number}"]
    assert not caplog.text


async def test_loads_go_on_after_an_answer_that_is_none(
    tmp_path: pathlib.Path,
    replica: Replica,
    server: tuple[Server, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(corpora, "GATHER_S", 0.01)
    kept, (held, _) = made(tmp_path, replica), server
    held.broken = True
    kept.start()
    kept.offer(request("g0", "1+1=", "2"))
    async with asyncio.timeout(DEADLINE_S):
        while "rollout-0-1" not in held.held:
            await held.changed.wait()
            held.changed.clear()
        kept.load_again()
        while list(held.held) != ["rollout-0-2"]:
            await held.changed.wait()
            held.changed.clear()
    assert "JSONDecodeError" in caplog.text
    kept.close()


async def test_a_server_that_was_restarted_gets_the_corpus_again(
    tmp_path: pathlib.Path, replica: Replica, server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "GATHER_S", 0.01)
    kept, (held, _) = made(tmp_path, replica), server
    kept.load_again()
    kept.start()
    kept.offer(request("g0", "1+1=", "2"))
    async with asyncio.timeout(DEADLINE_S):
        await held.changed.wait()
        held.held.clear()
        held.changed.clear()
        kept.load_again()
        while not held.held:
            await held.changed.wait()
            held.changed.clear()
    assert held.texts() == [["1+1=2"]]
    kept.close()


async def test_without_a_tokenizer_there_are_no_corpora(tmp_path: pathlib.Path, replica: Replica) -> None:
    kept = ResponseCorpora("rollout-0", str(tmp_path), [replica], max_tokens=1000, timeout_s=DEADLINE_S)
    kept.offer(request("g0", "1+1=", "2"))
    with pytest.raises(DataError, match="no tokenizer"):
        await kept.load()

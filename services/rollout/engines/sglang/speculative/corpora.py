"""Keeps a corpus of earlier responses in every server that drafts by NGRAM.

SGLang searches all its external corpora alike for every request, and divides the tokens that it may draft from them by
their number (`ngram.cpp`). So each server has one corpus, of the responses to all prompts that came last. A corpus
cannot grow: a new one is loaded beside it, and takes its place. SGLang builds it in a thread of its own. Over HTTP it
takes text alone, and tokenises it again: what a response has in other tokens than its text would, is no draft.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles.data.errors import DataError
from miles.data.template import load_tokenizer
from miles.services.rollout.engines.base import EngineFailed, GenerationRequest
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.speculative.responses_kept import ResponsesKept, Tokens

if TYPE_CHECKING:
    from miles.services.rollout.engines.sglang.server.http_api import SglangApi
    from miles.services.rollout.engines.sglang.server.replica import Replica

log = logging.getLogger(__name__)

GATHER_S = 0.5
"""How long offers are gathered before a corpus is built of them."""
REST = 20.0
"""Pause behind a load, as a multiple of the time that it took: it keeps the server's front process from other work."""


class ResponseCorpora:
    """The corpora of an engine's servers. A load that fails is a warning: servers draft without it."""

    def __init__(
        self,
        name: str,
        hf_checkpoint: str,
        replicas: Sequence[Replica],
        max_tokens: int,
        timeout_s: float,
    ) -> None:
        """`max_tokens`: of a corpus, of which a server holds two for a moment; `name`: of this engine among others."""
        self._name = name
        self._folder = hf_checkpoint
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._kept = ResponsesKept(max_tokens)
        self._wanted = asyncio.Event()
        self._number = 0
        self._held: dict[int, tuple[SglangApi, list[str]]] = {}
        """By server, the connection by which it got corpora, and the ids of those that it may have. A server that was
        restarted has another connection, and no corpus."""
        self._tokenizer: Any = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Load corpora from now on."""
        self._task = asyncio.create_task(self._run(), name=f"corpora of {self._name}")

    def close(self) -> None:
        """Stop loading."""
        if self._task is not None:
            self._task.cancel()

    def offer(self, request: GenerationRequest) -> None:
        """Keep a request's earlier responses for it and those behind it. Returns at once."""
        if request.earlier_responses:
            prompt = request.input_ids[: len(request.input_ids) - request.resumed_tokens]
            if self._kept.offer(request.group, prompt, request.earlier_responses):
                self._wanted.set()

    def load_again(self) -> None:
        """Load what is kept into servers that came up, and lack it."""
        if self._kept.tokens:
            self._wanted.set()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            await asyncio.sleep(GATHER_S)
            self._wanted.clear()
            try:
                busy_s = await self.load()
            except DataError as error:
                log.warning("earlier responses are no drafts: %s", error)
                return
            except Exception:  # whatever it is, the next responses may do without it
                log.exception("servers draft without the newest earlier responses")
                busy_s = GATHER_S
            await asyncio.sleep(REST * busy_s)

    async def load(self) -> float:
        """Load what is kept into every server that is up, in the place of what they had.

        Returns the seconds that servers took. Raises DataError when the model's folder has no tokenizer.
        """
        texts = await asyncio.to_thread(self._texts, self._kept.documents())
        self._number += 1
        corpus = f"{self._name}-{self._number}"
        began = time.monotonic()
        loads = (self._replace(replica, corpus, texts) for replica in self._replicas if replica.up)
        for failure in await asyncio.gather(*loads, return_exceptions=True):
            if failure is not None:
                raise failure
        return time.monotonic() - began

    async def _replace(self, replica: Replica, corpus: str, texts: Sequence[str]) -> None:
        api = replica.api
        held_by, held = self._held.get(replica.index, (None, []))
        if held_by is not api:
            held = []
            self._held[replica.index] = (api, held)
        try:
            if len(held) > 1:  # a call of the last load failed: make room first
                await self._remove(api, held)
            earlier = held.copy()
            held.append(corpus)  # even if the call fails here, it may succeed in the server
            await api.post("/add_external_corpus", {"corpus_id": corpus, "documents": texts}, self._timeout_s)
        except (EngineFailed, ServerRefused) as error:
            log.warning("%s drafts without the newest earlier responses: %s", replica.name, error)
            return
        with contextlib.suppress(EngineFailed):  # then the next load does it
            await self._remove(api, earlier)
            held[:] = [corpus]

    async def _remove(self, api: SglangApi, corpora: list[str]) -> None:
        """Remove corpora, from the list too. SGLang must not be asked to while it builds one."""
        while corpora:
            with contextlib.suppress(ServerRefused):  # it has none of that id
                await api.post("/remove_external_corpus", {"corpus_id": corpora[0]}, self._timeout_s)
            del corpora[0]

    def _texts(self, documents: Sequence[Tokens]) -> list[str]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        tokenizer = self._tokenizer
        return [
            str(tokenizer.decode(each, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for each in documents
        ]

"""The drafts of an engine's servers: what they are told, what becomes of what they propose, and what they do now."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles.config.sglang.adaptive_steps import why_not_adaptive
from miles.config.speculation import DraftKind, Speculation, speculation_of
from miles.services.rollout.engines.base import EngineFailed, GenerationRequest, SpeculationState
from miles.services.rollout.engines.sglang.errors import ServerRefused, ServerUnstartable
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.speculative.adaptive import adaptive_config
from miles.services.rollout.engines.sglang.speculative.corpora import ResponseCorpora
from miles.services.rollout.engines.sglang.speculative.drafting_flags import (
    NGRAM_DRAFT_TOKENS,
    corpus_tokens,
    drafting_flags,
)
from miles.services.rollout.engines.sglang.speculative.reason import why_fewer
from miles.services.rollout.engines.version_counts import VersionCounts

GREEDY_ON_CPU = (
    "on a CPU SGLang verifies drafts greedily, whatever the temperature: leave out speculative_algorithm, or set "
    "rollout_backend to torch"
)
ASK_EVERY_S = 10.0
"""How often servers are asked how many steps they draft now."""


class ServerDrafts:
    """Speculative decoding as an engine sees it. Without any, its methods do nothing."""

    def __init__(self, options: SglangOptions, replicas: Sequence[Replica]) -> None:
        self._options = options
        self._replicas = replicas
        self._flags: Mapping[str, Any] = options.server_flags
        self.drafts: Speculation = speculation_of(self._flags)
        """What servers draft with; for attached ones what they say, once that is known."""
        self.counts = VersionCounts()
        self._corpora: ResponseCorpora | None = None
        """Earlier responses in the servers; None unless they draft from some."""
        self._files = contextlib.ExitStack()
        self._watching: asyncio.Task[None] | None = None
        self._steps: dict[int, int] = {}
        """Steps that each server drafts now, by its number."""

    def flags(self) -> dict[str, Any]:
        """SGLang's flags of the servers that are started here, beside those that the job gives.

        Steps follow what is accepted unless the job says otherwise, wherever SGLang can do that.
        """
        given = self._flags
        added = drafting_flags(self.drafts, given, responses=self._options.earlier_responses)
        if self.drafts.is_on and self.drafts.adaptive is not False and why_not_adaptive(self.drafts, given) is None:
            added["speculative_adaptive"] = True
            if given.get("speculative_adaptive_config") is None:
                added["speculative_adaptive_config"] = str(self._write_tiers())
        return added

    def prepare(self) -> None:
        """Say how servers are to be started. Raises ServerUnstartable for drafts that would change what is sampled."""
        if not self._options.addresses:
            if self.drafts.is_on and not self._options.on_gpu:
                raise ServerUnstartable(GREEDY_ON_CPU)
            flags = self.flags()
            for replica in self._replicas:
                replica.drafting = flags

    def start(self, server: Mapping[str, Any]) -> None:
        """Follow the servers, which are up; `server`: what one of them answers to /server_info.

        Raises ServerUnstartable as `prepare` does, for servers that run already.
        """
        if self._options.addresses:
            self._flags, self.drafts = server, speculation_of(server)
            if self.drafts.is_on and server.get("device") == "cpu":
                raise ServerUnstartable(GREEDY_ON_CPU)
        if server.get("speculative_adaptive"):
            self._watching = asyncio.create_task(self._watch(), name="steps of drafts")
        if self.drafts.kind is DraftKind.NGRAM and self._options.earlier_responses:
            self._corpora = ResponseCorpora(
                *(self._options.name, self._options.hf_checkpoint, self._replicas),
                max_tokens=corpus_tokens(server),
                timeout_s=self._options.call_timeout_s,
            )
            self._corpora.start()

    def close(self) -> None:
        """Follow them no more, and remove the files that they were started with."""
        if self._watching is not None:
            self._watching.cancel()
        if self._corpora is not None:
            self._corpora.close()
        self._files.close()

    def offer(self, request: GenerationRequest) -> None:
        """Have servers draft from a request's earlier responses, if it has any."""
        if self._corpora is not None:
            self._corpora.offer(request)

    def on_server_up(self) -> None:
        """Bring a server that was restarted what the others draft from."""
        if self._corpora is not None:
            self._corpora.load_again()

    def state(self, draft_version: int | None) -> SpeculationState | None:
        """What `EngineStats.speculation` says; None without drafts."""
        if not self.drafts.is_on:
            return None
        bound = self._bound
        now = max(self._steps.values(), default=bound)
        counts = self.counts.counts
        reason = why_fewer(self.drafts, bound, list(self._steps.values()), counts)
        return SpeculationState(draft_version, now, reason, counts)

    @property
    def _bound(self) -> int:
        """Most tokens drafted one behind the other."""
        if self.drafts.kind is DraftKind.NGRAM:
            tokens = self._flags.get("speculative_num_draft_tokens")
            return int(tokens or NGRAM_DRAFT_TOKENS) - 1
        return self.drafts.num_steps

    def _write_tiers(self) -> Path:
        parent = self._options.log_dir
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=f"{self._options.name}-drafts-", dir=parent)
        path = Path(self._files.enter_context(made)) / "adaptive.json"
        samples = bool(self._flags.get("speculative_use_rejection_sampling"))
        path.write_text(json.dumps(adaptive_config(self.drafts.num_steps, may_end=not samples), indent=2))
        return path

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            await asyncio.gather(*(self._ask(replica) for replica in self._replicas))

    async def _ask(self, replica: Replica) -> None:
        if not replica.up:
            self._steps.pop(replica.index, None)
            return
        with contextlib.suppress(EngineFailed, ServerRefused):
            server = await replica.api.get("/server_info", ASK_EVERY_S)
            steps = [state.get("speculative_num_steps") for state in server.get("internal_states") or ()]
            if known := [int(each) for each in steps if each is not None]:
                self._steps[replica.index] = max(known)

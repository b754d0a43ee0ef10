"""The dispatcher of an engine: gives requests to servers, streams their responses, and aborts them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

from miles.change_signal import ChangeSignal
from miles.services.rollout.engines.base import (
    EngineFailed,
    EngineStats,
    GenerationDelta,
    GenerationRequest,
)
from miles.services.rollout.engines.request_checks import check_request
from miles.services.rollout.engines.sglang.background import BackgroundCalls
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.requests.busy_clock import BusyClock
from miles.services.rollout.engines.sglang.requests.continuation import Continuation, read_end_tokens
from miles.services.rollout.engines.sglang.requests.payload import STREAM_INTERVAL, to_payload
from miles.services.rollout.engines.sglang.requests.responses import ResponseDecoder, speculative_counters
from miles.services.rollout.engines.sglang.requests.server_choice import Router
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.speculative.request_counters import RequestCounters
from miles.types import SpeculativeStats
from miles.types.experts import read_expert_layout

ABORT_DEADLINE_S = 60.0
"""How long a pause that aborts waits for requests to end."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelAbilities:
    """What the dispatcher needs to know of the servers' model."""

    vocabulary: int
    max_total_tokens: int
    """Limit of prompt and response together."""
    seeded: bool
    """Whether the servers honour seeds."""


@dataclasses.dataclass(slots=True)
class _ActiveRequest:
    """A request that waits for a server or runs on one."""

    request: GenerationRequest
    rid: str = ""
    """Its id on the server. No other id begins with it, because SGLang aborts every request whose id begins so."""
    replica: Replica | None = None
    """The server that runs it; None while it waits."""
    aborted: bool = False
    interrupted: bool = False
    """Ended on its server for a pause; another request goes on with it."""


class Dispatcher:
    """Gives requests to the servers that hold the wanted version, streams their responses and aborts them."""

    def __init__(
        self,
        options: SglangOptions,
        replicas: Sequence[Replica],
        changed: ChangeSignal,
        background: BackgroundCalls,
        *,
        wanted_version: Callable[[], int | None],
        on_waiting: Callable[[], None],
        on_verified: Callable[[int, SpeculativeStats], None] = lambda version, new: None,
    ) -> None:
        """Build it; requests come once `model` is set.

        `on_waiting` is called while a request waits for a server, which may have released its memory. `on_verified`
        gets what became of drafts since the last event of a response, with the version that its server holds.
        """
        self._replicas = replicas
        self._changed = changed
        self._background = background
        self._wanted_version = wanted_version
        self._on_waiting = on_waiting
        self._on_verified = on_verified
        self._experts = read_expert_layout(options.hf_checkpoint) if options.routed_experts else None
        self._end_tokens = read_end_tokens(options.hf_checkpoint)
        self._router = Router()
        self._active: dict[str, _ActiveRequest] = {}
        self._clock = BusyClock()
        self._generated_tokens = 0
        self._interval = int(options.server_flags.get("stream_interval") or STREAM_INTERVAL)
        name = f"{options.name}-{uuid.uuid4().hex[:8]}"
        self._rids = (f"{name}-{i:012d}" for i in itertools.count())
        self.model = ModelAbilities(vocabulary=0, max_total_tokens=0, seeded=False)
        """To be set before the first request."""
        self.held = False
        """Whether new requests wait; those on servers are not affected."""

    def let_go(self) -> None:
        """Give the waiting requests to servers again."""
        self.held = False
        self._changed.notify()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Have new requests wait meanwhile."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before
            self._changed.notify()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See `SglangEngine.generate`."""
        self._check(request)
        active = _ActiveRequest(request)
        response = Continuation(request, self._end_tokens)
        self._active[request.request_id] = active
        self._clock.set(True)
        try:
            goes_on = True
            while goes_on:
                goes_on = False
                if not await self._place(active):
                    yield GenerationDelta([], [], response.aborted())
                    return
                async with contextlib.aclosing(self._deltas(active, response.request)) as deltas:
                    async for delta in deltas:
                        self._generated_tokens += len(delta.token_ids)
                        delta = response.add(delta)
                        if delta.result is not None:
                            self._leave(active)
                            goes_on = active.interrupted and not active.aborted and response.goes_on(delta.result)
                        yield dataclasses.replace(delta, result=None) if goes_on else delta
        finally:
            del self._active[request.request_id]
            self._clock.set(bool(self._active))
            if (replica := active.replica) is not None:
                self._leave(active)
                if replica.version is not None:
                    self._background.start(replica.abort(active.rid))

    def _leave(self, active: _ActiveRequest) -> None:
        """Note that no server runs the request any more."""
        if active.replica is not None:
            active.replica.running -= 1
            active.replica = None
            self._changed.notify()

    async def abort(self, request_ids: Sequence[str] | None) -> None:
        """End these requests (None: all) with the tokens they have."""
        chosen = list(self._active) if request_ids is None else [i for i in request_ids if i in self._active]
        for request_id in chosen:
            self._active[request_id].aborted = True
        self._changed.notify()
        await self._abort_on_servers([self._active[request_id] for request_id in chosen])

    async def _abort_on_servers(self, chosen: Sequence[_ActiveRequest]) -> None:
        calls = [active.replica.abort(active.rid) for active in chosen if active.replica is not None]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, EngineFailed):
                raise outcome

    async def abort_running(self) -> None:
        """Abort the requests that run on servers, and return once they have ended; those that wait stay.

        Raises TimeoutError when some have not ended after `ABORT_DEADLINE_S`.
        """
        await self.abort([i for i, active in self._active.items() if active.replica is not None])
        await self._ended(list(self._active.values()))

    async def interrupt_recorded(self) -> None:
        """End the requests that run on servers and record routing, and return once they have ended.

        Each goes on with another request once nothing holds requests. Raises TimeoutError as `abort_running` does.
        """
        chosen = [a for a in self._active.values() if a.replica is not None and a.request.return_routed_experts]
        for active in chosen:
            active.interrupted = True
        await self._abort_on_servers(chosen)
        await self._ended(chosen)

    async def _ended(self, chosen: Sequence[_ActiveRequest]) -> None:
        def left() -> int:
            return sum(active.replica is not None for active in chosen)

        try:
            async with asyncio.timeout(ABORT_DEADLINE_S):
                while left():
                    await self._changed.wait()
        except TimeoutError:
            message = f"waited {ABORT_DEADLINE_S:g} s for {left()} requests to end after their abort"
            raise TimeoutError(message) from None

    def stats(self) -> EngineStats:
        """Counters as of now."""
        running = self._running()
        return EngineStats(
            running_requests=running,
            waiting_requests=len(self._active) - running,
            generated_tokens=self._generated_tokens,
            busy_s=self._clock.seconds,
        )

    def _running(self) -> int:
        return sum(active.replica is not None for active in self._active.values())

    async def _place(self, active: _ActiveRequest) -> bool:
        """Wait until a server has room and give it the request; False when the request was aborted meanwhile."""
        while not active.aborted:
            if not active.interrupted:
                self._on_waiting()
            if not self.held:
                candidates = [replica.candidate() for replica in self._replicas]
                index = self._router.choose(candidates, active.request.group, self._wanted_version())
                if index is not None:
                    active.replica = self._replicas[index]
                    active.replica.running += 1
                    return True
            await self._changed.wait()
        return False

    async def _deltas(
        self, active: _ActiveRequest, request: GenerationRequest
    ) -> AsyncGenerator[GenerationDelta, None]:
        replica = active.replica
        assert replica is not None
        active.rid, active.interrupted = next(self._rids), False
        experts = self._experts if request.return_routed_experts else None
        decoder = ResponseDecoder(len(request.input_ids), experts, request.routed_experts_start, request.top_token_ids)
        payload = to_payload(
            request, active.rid, cache_key=replica.cache_key, seeded=self.model.seeded, interval=self._interval
        )
        counters, version = RequestCounters(), replica.version
        async with contextlib.aclosing(replica.batches.generate(request.group, payload)) as events:
            async for event in events:
                replica.mark_progress()
                version = version if replica.version is None else replica.version
                if version is not None:
                    self._on_verified(version, counters.new(speculative_counters(event["meta_info"])))
                delta = await decoder.decode_apart(event)
                yield delta
                if delta.result is not None:
                    return
        raise EngineFailed(f"SGLang at {replica.api.address} ended a response without a reason")

    def _check(self, request: GenerationRequest) -> None:
        given, start = len(request.input_ids), request.routed_experts_start
        most = request.sampling.max_new_tokens
        check_request(
            request,
            vocabulary=self.model.vocabulary,
            max_total_tokens=self.model.max_total_tokens,
            running=request.request_id in self._active,
            further=(
                (
                    most > request.resumed_tokens,
                    f"max_new_tokens is {most}; it must be more than the {request.resumed_tokens} resumed",
                ),
                (0 <= start <= given, f"routed_experts_start is {start}; there are {given} input tokens"),
                (
                    not request.return_routed_experts or self._experts is not None,
                    "routed experts are not recorded: the model has none, or neither use_rollout_routing_replay nor "
                    "observe_rollout_routing is set",
                ),
            ),
        )

"""The engine: one face for one or several SGLang servers that hold the same version."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.rpc.gen import weightsync_pb2
from miles.services.rollout.engines.base import (
    EngineStats,
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    GenerationResult,
    PauseMode,
)
from miles.services.rollout.engines.sglang.errors import EngineFailed, ServerRefused
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.requests import payload as requests
from miles.services.rollout.engines.sglang.requests.active import ActiveRequest, BusyClock, Signal
from miles.services.rollout.engines.sglang.requests.responses import ResponseDecoder
from miles.services.rollout.engines.sglang.requests.routed_experts import read_expert_layout
from miles.services.rollout.engines.sglang.requests.server_choice import Router
from miles.services.rollout.engines.sglang.server import flags
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.speculative.draft import DraftModel
from miles.services.rollout.engines.sglang.weights.remote import RemoteTransport
from miles.services.rollout.engines.sglang.weights.update import WeightLoader
from miles.weights.registry import create_transport

if TYPE_CHECKING:
    import torch

    from miles.rpc.gen.weightsync_pb2 import TransportKind
    from miles.weights.base import Endpoint, WeightReceiver

log = logging.getLogger(__name__)

CATCH_UP_AGAIN_S, CATCH_UP_AT_LEAST_S = 5.0, 60.0
"""How long a server waits for the trainer to be there again, at first and in the end."""
ABORT_DEADLINE_S = 60.0
"""How long a pause that aborts may wait for requests to end."""


class SglangEngine:
    """SGLang servers as a rollout engine; implements `RolloutEngine`.

    Servers are started here (managed) or belong to somebody else (attached). A server that is lost fails its requests,
    is started anew, gets the engine's weights again and rejoins; until then its share goes to the others.
    """

    def __init__(self, options: SglangOptions) -> None:
        self._options = options
        self._signal = Signal()
        count = len(options.addresses) or options.engines
        self._replicas = [Replica(options, i, self._catch_up, self._signal.fire) for i in range(count)]
        self._loader = WeightLoader(options, self._replicas, self._signal)
        self._experts = read_expert_layout(options.hf_checkpoint) if options.routed_experts else None
        self._router = Router()
        self._active: dict[str, ActiveRequest] = {}
        self._order = asyncio.Lock()
        self._pause_mode: PauseMode | None = None
        self._held = False
        """Whether no request may be given to a server."""
        self._released = False
        """Whether the servers' memory was released and nothing has asked for it again."""
        self._clock = BusyClock()
        self._generated_tokens = 0
        self._draft: DraftModel | None = None
        self._vocabulary = 0
        self._max_total_tokens = 0
        self._rids = (f"{options.name}-{uuid.uuid4().hex[:8]}-{i:012d}" for i in itertools.count())
        self._seeded = flags.is_deterministic(options.server_flags)
        self._interval = int(options.server_flags.get("stream_interval") or requests.STREAM_INTERVAL)
        self._background: set[asyncio.Task[None]] = set()

    @property
    def version(self) -> int | None:
        """Policy version served now; None before the first `load_weights`."""
        return self._loader.version

    @property
    def max_running_requests(self) -> int:
        """Requests that the servers which hold the version take at once; changes with their caches and their health."""
        return sum(r.limit.limit for r in self._replicas if r.version is not None and r.version == self.version)

    @property
    def device(self) -> torch.device:
        """Where weights are wanted."""
        import torch

        return torch.device("cuda", self._options.first_gpu) if self._options.on_gpu else torch.device("cpu")

    @property
    def draft(self) -> DraftModel | None:
        """The servers' draft model, if it has weights of its own."""
        return self._draft

    @property
    def replicas(self) -> Sequence[Replica]:
        """The servers."""
        return self._replicas

    async def start(self) -> None:
        """Start or reach every server. Raises ServerUnstartable."""
        try:
            await self._loader.prepare()
            await asyncio.gather(*(replica.start() for replica in self._replicas))
            info = await self._replicas[0].api.get("/model_info", self._options.order_timeout_s)
            server = await self._replicas[0].api.get("/server_info", self._options.order_timeout_s)
        except BaseException:
            await self.close()
            raise
        self._find_draft(server if self._options.addresses else self._options.server_flags)
        self._vocabulary = int(info.get("vocab_size") or self._loader.vocabulary)
        longest = int(server.get("max_req_input_len") or self._loader.max_positions - flags.SPARE_TOKENS)
        self._max_total_tokens = min(self._options.max_total_tokens or longest, longest)
        if self._options.addresses:
            self._seeded = bool(server.get("enable_deterministic_inference"))

    async def close(self) -> None:
        """End every request and every server that was started here."""
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*(replica.close() for replica in self._replicas))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """Stream a response, some dozen tokens at a time. Leaving the iterator early aborts the request.

        Raises ValueError, listing all faults, for a request the engine cannot serve, and EngineFailed when its server
        is lost.
        """
        self._validate(request)
        active = ActiveRequest(request, next(self._rids))
        self._active[request.request_id] = active
        self._clock.set(True)
        ended = False
        try:
            if not await self._place(active):
                ended = True
                yield GenerationDelta([], [], GenerationResult(FinishReason.ABORT, ()))
                return
            async with contextlib.aclosing(self._deltas(active)) as deltas:
                async for delta in deltas:
                    ended = delta.result is not None
                    self._generated_tokens += len(delta.token_ids)
                    yield delta
        finally:
            del self._active[request.request_id]
            self._clock.set(bool(self._active))
            if (replica := active.replica) is not None:
                replica.running -= 1
                self._signal.fire()
                if not ended and replica.version is not None:
                    self._spawn(replica.abort(active.rid))

    async def _deltas(self, active: ActiveRequest) -> AsyncGenerator[GenerationDelta, None]:
        request, replica = active.request, active.replica
        assert replica is not None
        experts = self._experts if request.return_routed_experts else None
        decoder = ResponseDecoder(len(request.input_ids), experts, request.routed_experts_start)
        payload = requests.to_payload(
            request, active.rid, cache_key=f"v{replica.version}", seeded=self._seeded, interval=self._interval
        )
        async with contextlib.aclosing(replica.batches.generate(request.group, payload)) as events:
            async for event in events:
                replica.moved()
                delta = await decoder.decode_apart(event)
                yield delta
                if delta.result is not None:
                    return
                if active.aborted:  # the order came before the server knew of the request
                    await replica.abort(active.rid)
        raise EngineFailed(f"SGLang at {replica.api.address} ended a response without a reason")

    async def _place(self, active: ActiveRequest) -> bool:
        """Wait until a server has room and give it the request; False when the request was aborted meanwhile."""
        while not active.aborted:
            if self._released and self._pause_mode is None:
                self._released = False
                self._spawn(self.resume())
            if not self._held:
                candidates = [replica.candidate() for replica in self._replicas]
                index = self._router.choose(candidates, active.request.group, self.version)
                if index is not None:
                    active.replica = self._replicas[index]
                    active.replica.running += 1
                    return True
            await self._signal.wait()
        return False

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (None: all) with what they have, reason ABORT."""
        chosen = list(self._active) if request_ids is None else [i for i in request_ids if i in self._active]
        orders = []
        for request_id in chosen:
            active = self._active[request_id]
            active.aborted = True
            if active.replica is not None:
                orders.append(active.replica.abort(active.rid))
        self._signal.fire()
        for outcome in await asyncio.gather(*orders, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, EngineFailed):
                raise outcome

    async def pause(self, mode: PauseMode) -> None:
        """Return once no step is running and none will start before `resume`."""
        async with self._order:
            self._held = True
            if mode is PauseMode.ABORT:
                await self._abort_and_wait()
            await self._loader.pause("in_place" if mode is PauseMode.IN_PLACE else "retract")
            self._pause_mode = mode

    async def _abort_and_wait(self) -> None:
        await self.abort([i for i, active in self._active.items() if active.replica is not None])
        try:
            async with asyncio.timeout(ABORT_DEADLINE_S):
                while any(active.replica is not None for active in self._active.values()):
                    await self._signal.wait()
        except TimeoutError:
            left = sum(active.replica is not None for active in self._active.values())
            raise TimeoutError(f"waited {ABORT_DEADLINE_S:g} s for {left} requests to end after their abort") from None

    async def resume(self) -> None:
        """Go on decoding."""
        async with self._order:
            self._released = False
            await self._loader.restore_memory()
            await self._loader.resume()
            self._pause_mode = None
            self._let_go()

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        """Swap in a full set of weights between two steps; return how long decoding stood still, in seconds.

        `tensors` are kept, to bring servers that restart to the same version; they must stay valid until the next call
        returns. Raises ValueError before anything changed when they do not fit the model. Without a pause of the
        caller's, requests go on in place, with the keys and values that they have.
        """
        self._loader.check(tensors)
        async with self._order:
            paused = self._pause_mode
            self._held = True
            began = time.monotonic()
            if paused is None and not self._released:
                await self._loader.pause("in_place")
            # In place, requests still need what the cache holds; new ones find nothing of older versions in it.
            await self._loader.load(version, tensors, flush=paused not in (None, PauseMode.IN_PLACE))
            self._released = False
            if paused is None:
                await self._loader.resume()
                self._let_go()
            return time.monotonic() - began

    def _find_draft(self, server: Mapping[str, Any]) -> None:
        if flags.has_draft_weights(server):
            self._loader.keep_draft_apart(str(server["speculative_algorithm"]))
            folder = str(server["speculative_draft_model_path"])
            self._draft = DraftModel(self.device, folder, self._load_draft, self._verify_draft)

    async def _load_draft(self, tensors: Mapping[str, torch.Tensor]) -> float:
        async with self._between_steps():
            began = time.monotonic()
            await self._loader.load_draft(tensors)
        return time.monotonic() - began

    async def _verify_draft(self) -> None:
        async with self._between_steps():
            await self._loader.verify_draft()

    @contextlib.asynccontextmanager
    async def _between_steps(self) -> AsyncGenerator[None, None]:
        """Schedulers stand still in here; requests stay where they are, and new ones wait inside the servers."""
        async with self._order:
            standing = self._pause_mode is not None or self._released
            if not standing:
                await self._loader.pause("in_place")
            try:
                yield
            finally:
                if not standing:
                    await self._loader.resume()

    def create_receiver(self, kind: TransportKind.ValueType, endpoint: Endpoint) -> WeightReceiver:
        """What gets weights for the servers: with weight_path "distributed", broadcasts go past this process."""
        if self._options.weight_path == "distributed" and kind == weightsync_pb2.TRANSPORT_KIND_COLLECTIVE:
            return RemoteTransport(endpoint)
        return create_transport(kind, endpoint)

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        """The parameters as served, by HF name: the last ones loaded, once the servers are proven to hold them.

        SGLang fuses and shards parameters and gives none of them back whole. So each server's checksum is compared
        with the one it has after everything it holds was overwritten with noise and the same tensors were loaded
        again: a parameter that the first load missed, damaged or left behind makes the two differ. Raises
        ChecksumMismatch when they do.
        """
        async with self._order:
            held, self._held = self._held, True
            if self._pause_mode is None:
                await self._loader.pause("in_place")
            try:
                return await self._loader.verify()
            finally:
                if self._pause_mode is None:
                    await self._loader.resume()
                    self._held = held
                    self._signal.fire()

    async def release_memory(self) -> None:
        """Free the servers' weights and caches until `resume` or the next load; running requests are retracted."""
        async with self._order:
            self._held = True
            await self._loader.pause("retract")
            await self._loader.release_memory()
            self._released = True

    def stats(self) -> EngineStats:
        """Counters as of now."""
        placed = sum(active.replica is not None for active in self._active.values())
        return EngineStats(
            running_requests=placed,
            waiting_requests=len(self._active) - placed,
            generated_tokens=self._generated_tokens,
            busy_s=self._clock.seconds,
        )

    async def _catch_up(self, replica: Replica) -> None:
        async with self._order:
            caught_up = await self._loader.catch_up(replica, paused=self._pause_mode is not None)
        self._signal.fire()
        if not caught_up:
            self._spawn(self._catch_up_later(replica))

    async def _catch_up_later(self, replica: Replica) -> None:
        """Try again until the server holds the engine's version: by this, or because a newer one came."""
        pause_s = CATCH_UP_AGAIN_S
        while replica.up and replica.version is None:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, CATCH_UP_AT_LEAST_S)
            async with self._order:
                try:
                    await self._loader.catch_up(replica, paused=self._pause_mode is not None)
                except (EngineFailed, ServerRefused) as error:
                    replica.give_up(f"it could not catch up: {error}")
            self._signal.fire()

    def _let_go(self) -> None:
        self._held = False
        self._signal.fire()

    def _validate(self, request: GenerationRequest) -> None:
        found = requests.faults(
            request,
            vocabulary=self._vocabulary,
            max_total_tokens=self._max_total_tokens,
            running=request.request_id in self._active,
        )
        if request.return_routed_experts and self._experts is None:
            found.append("routed experts are not recorded: the model has none, or use_rollout_routing_replay is off")
        if found:
            raise ValueError(f"request {request.request_id}: " + "; ".join(found))

    def _spawn(self, order: object) -> None:
        async def carry_out() -> None:
            with contextlib.suppress(EngineFailed, ServerRefused):
                await order  # type: ignore[misc]

        task = asyncio.create_task(carry_out())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

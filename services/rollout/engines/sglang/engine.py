"""The engine: one or several SGLang servers that hold the same version, behind the engine interface."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.change_signal import ChangeSignal
from miles.engine_spec import EngineSpec, engine_spec
from miles.rpc.gen import weightsync_pb2
from miles.services.rollout.engines.base import (
    EngineFailed,
    EngineStats,
    GenerationDelta,
    GenerationRequest,
    PauseMode,
)
from miles.services.rollout.engines.sglang.background import BackgroundCalls
from miles.services.rollout.engines.sglang.errors import ServerRefused, ServerUnstartable
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.requests.dispatcher import Dispatcher, ModelAbilities
from miles.services.rollout.engines.sglang.server import flags
from miles.services.rollout.engines.sglang.server.attached import why_unfit
from miles.services.rollout.engines.sglang.server.group import ServerGroup
from miles.services.rollout.engines.sglang.server.process import IN_SERVER
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.speculative.draft import DraftModel
from miles.services.rollout.engines.sglang.speculative.drafting import ServerDrafts
from miles.services.rollout.engines.sglang.weights.loader import WeightLoader
from miles.services.rollout.engines.sglang.weights.remote import RemoteTransport
from miles.types import SpeculativeStats
from miles.weights.registry import create_transport

if TYPE_CHECKING:
    import torch

    from miles.rpc.gen.weightsync_pb2 import TransportKind
    from miles.services.rollout.engines.sglang.weights.staging import StagedWeights
    from miles.weights.base import Endpoint, WeightReceiver

FIRST_RETRY_S, LAST_RETRY_S = 5.0, 60.0
"""Pauses between attempts to bring a server to the engine's version while the trainer cannot be reached."""


class SglangEngine:
    """SGLang servers as a rollout engine; implements `RolloutEngine`.

    Servers are started here (managed) or run already (attached). The requests of a server that is lost fail; the server
    is restarted, loads the engine's weights again and rejoins. Until then the others take over its share.
    """

    def __init__(self, options: SglangOptions) -> None:
        self._options = options
        self._changed = ChangeSignal()
        self._replicas = [Replica(options, i, self._catch_up, self._changed.notify) for i in range(options.count)]
        self._servers = ServerGroup(self._replicas, self._changed, options.start_timeout_s)
        self._loader = WeightLoader(options, self._servers)
        self._background = BackgroundCalls()
        self._dispatcher = Dispatcher(
            *(options, self._replicas, self._changed, self._background),
            wanted_version=lambda: self.version,
            on_waiting=self._wake,
            on_verified=self._count_drafts,
        )
        self._drafting = ServerDrafts(options, self._replicas)
        self._lock = asyncio.Lock()
        """Held by whatever pauses, resumes or changes the servers: one at a time."""
        self._staged: tuple[Mapping[str, torch.Tensor], StagedWeights | None] | None = None
        """Weights that were staged and not loaded yet, and what they became."""
        self._pause_mode: PauseMode | None = None
        self._released = False
        """Whether the servers' memory was released and nothing has asked for it again."""
        self._draft: DraftModel | None = None

    @property
    def spec(self) -> EngineSpec:
        """What SGLang engines can take."""
        return engine_spec("sglang")

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
        """Where to put new weights."""
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
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.close)
            await self._loader.prepare()
            self._drafting.prepare()
            await asyncio.gather(*(replica.start() for replica in self._replicas))
            api, timeout_s = self._replicas[0].api, self._options.call_timeout_s
            info, server = await api.get("/model_info", timeout_s), await api.get("/server_info", timeout_s)
            attached, given = bool(self._options.addresses), self._options.server_flags
            if attached:
                await asyncio.gather(*(self._check_attached(replica) for replica in self._replicas))
            if attached and (lossy := flags.lossy_acceptance(server)):
                raise ServerUnstartable(
                    f"{self._options.addresses[0]} runs with {lossy}, so that tokens are sampled more often than their "
                    "log-probabilities say; start it without"
                )
            undo.pop_all()
        self._find_draft(server if attached else given)
        self._drafting.start(server)
        longest = int(server.get("max_req_input_len") or self._loader.max_positions - flags.SPARE_TOKENS)
        self._dispatcher.model = ModelAbilities(
            vocabulary=int(info.get("vocab_size") or self._loader.vocabulary),
            max_total_tokens=min(self._options.max_total_tokens or longest, longest),
            seeded=flags.is_deterministic(server if attached else given),
        )

    async def _check_attached(self, replica: Replica) -> None:
        """Raise ServerUnstartable when a server that runs already cannot take the versions that will come.

        SGLang would convert values to the type that it holds them in, and leave their scales out.
        """
        server = await replica.api.get("/server_info", self._options.call_timeout_s)
        problem = why_unfit(server, self._options.recipe, self._options.dtype, self._loader.shapes)
        if problem is not None:
            raise ServerUnstartable(
                f"{replica.api.address} {problem}; set rollout_weight_format, or start it from another folder"
            )
        if self._options.repacks and not replica.has_functions:
            raise ServerUnstartable(
                f"{replica.api.address} may have captured graphs that updates of int4 weights would break; start it "
                f"with --custom-weight-loader {flags.KEEP_WORKSPACES} {flags.DRAIN}, and {IN_SERVER} in PYTHONPATH"
            )

    async def close(self) -> None:
        """End every request and every server that was started here."""
        self._background.cancel()
        await self._drop_staged()
        await asyncio.gather(*(replica.close() for replica in self._replicas))
        self._drafting.close()
        self._loader.close()

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """Stream a response, some dozen tokens at a time. Leaving the iterator early aborts the request.

        Raises ValueError listing all faults of a request that the engine cannot serve, and EngineFailed when its server
        is lost or answers nonsense; another try may work.
        """
        self._drafting.offer(request)
        return self._dispatcher.generate(request)

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (None: all) with the tokens they have, reason ABORT."""
        await self._dispatcher.abort(request_ids)

    async def pause(self, mode: PauseMode) -> None:
        """Return once no step is running and none will start before `resume`."""
        async with self._lock:
            self._dispatcher.held = True
            if mode is PauseMode.ABORT:
                await self._run_again_to_end()
                await self._dispatcher.abort_running()
            elif mode is PauseMode.RETRACT:
                await self._run_again_to_end()
                await self._dispatcher.interrupt_recorded()
            await self._servers.pause("in_place" if mode is PauseMode.IN_PLACE else "retract")
            self._pause_mode = mode

    async def resume(self) -> None:
        """Continue decoding."""
        async with self._lock:
            self._released = False
            await self._loader.restore_memory()
            await self._servers.resume()
            self._pause_mode = None
            self._dispatcher.let_go()

    async def stage_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Bring weights to where servers read them fast, while they generate; not while their memory is released.

        Raises WeightsRefused when they do not fit the model.
        """
        self._loader.check(tensors)
        async with self._lock:
            if self._staged is None or self._staged[0] is not tensors:
                await self._drop_staged()
                self._staged = tensors, await self._loader.stage(tensors)

    def _staged_of(self, tensors: Mapping[str, torch.Tensor]) -> StagedWeights | None:
        return self._staged[1] if self._staged is not None and self._staged[0] is tensors else None

    async def _drop_staged(self) -> None:
        staged, self._staged = self._staged, None
        if staged is not None and staged[1] is not None:
            await staged[1].close()

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        """Swap in a full set of weights between two steps; return the pause time in seconds.

        `tensors` are kept, to bring servers that restart to the same version; they must stay valid until the next call
        returns. Raises WeightsRefused before anything changed when they do not fit the model. Unless the caller has
        paused the engine, requests continue in place, with the keys and values that they have.
        """
        await self.stage_weights(tensors)
        async with self._lock, contextlib.AsyncExitStack() as at_end:
            at_end.push_async_callback(self._drop_staged)
            paused, staged = self._pause_mode, self._staged_of(tensors)
            self._dispatcher.held = True
            began = time.monotonic()
            if paused is None and not self._released:
                await self._servers.pause("in_place", updates=True)
            # In place, requests still need what the cache holds; new ones find nothing of older versions in it.
            await self._loader.load(version, tensors, flush=paused not in (None, PauseMode.IN_PLACE), staged=staged)
            self._released = False
            if paused is None:
                await self._servers.resume()
                self._dispatcher.let_go()
            return time.monotonic() - began

    def create_receiver(self, kind: TransportKind.ValueType, endpoint: Endpoint) -> WeightReceiver:
        """Build the receiver of new weights; with weight_path "distributed", broadcasts bypass this process."""
        if self._options.weight_path == "distributed" and kind == weightsync_pb2.TRANSPORT_KIND_COLLECTIVE:
            return RemoteTransport(endpoint)
        return create_transport(kind, endpoint)

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        """The parameters as served, by HF name: the last ones loaded, once the servers are proven to hold them.

        SGLang fuses and shards parameters and cannot return the full ones. So each server's checksum is compared with
        the one it has after everything it holds was overwritten with noise and the same tensors were loaded again: a
        parameter that the first load missed, damaged or left behind makes the two differ. Raises ChecksumMismatch when
        they do.
        """
        async with self._lock, self._paused_in_place(unless=self._pause_mode is not None):
            return await self._loader.verify()

    async def release_memory(self) -> int:
        """Free the servers' weights and caches until `resume` or the next load; running requests are retracted.

        Returns the bytes of memory that their GPUs have more; 0 for attached servers, whose GPUs are not known.
        """
        async with self._lock:
            self._dispatcher.held = True
            await self._run_again_to_end()
            await self._dispatcher.interrupt_recorded()
            await self._drop_staged()
            await self._servers.pause("retract", always=True)  # a scheduler that is not paused uses its memory
            before = self._free_memory()
            await self._loader.release_memory()
            self._released = True
            return max(0, self._free_memory() - before)

    def _free_memory(self) -> int:
        """Of the GPUs of the servers that were started here, in bytes."""
        import torch

        return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in self._options.own_gpus)

    async def _run_again_to_end(self) -> None:
        """Let requests of a pause in place end: a server ends none while it is paused."""
        if self._pause_mode is PauseMode.IN_PLACE and self._dispatcher.stats().running_requests:
            await self._servers.resume()

    def stats(self) -> EngineStats:
        """Counters as of now."""
        draft = None if self._draft is None else self._draft.version
        return dataclasses.replace(self._dispatcher.stats(), speculation=self._drafting.state(draft))

    def _count_drafts(self, version: int, new: SpeculativeStats) -> None:
        draft = None if self._draft is None else self._draft.version
        self._drafting.counts.add(version, draft, new)

    def _wake(self) -> None:
        """Give released memory back to the servers: a request waits for it."""
        if self._released and self._pause_mode is None:
            self._released = False
            self._background.start(self.resume())

    def _find_draft(self, server: Mapping[str, Any]) -> None:
        if flags.has_draft_weights(server):
            folder = str(server["speculative_draft_model_path"])
            self._draft = DraftModel(self.device, folder, self._load_draft, self._verify_draft)
            self._loader.keep_draft_apart(str(server["speculative_algorithm"]), self._draft.config)

    async def _load_draft(self, tensors: Mapping[str, torch.Tensor]) -> float:
        async with self._lock, self._paused_in_place(unless=self._pause_mode is not None or self._released):
            began = time.monotonic()
            await self._loader.load_draft(tensors)
        return time.monotonic() - began

    async def _verify_draft(self) -> None:
        async with self._lock, self._paused_in_place(unless=self._pause_mode is not None or self._released):
            await self._loader.verify_draft()

    @contextlib.asynccontextmanager
    async def _paused_in_place(self, *, unless: bool) -> AsyncGenerator[None, None]:
        """Keep the servers paused, `unless` they are already; requests stay where they are, and new ones wait."""
        with self._dispatcher.holding():
            if unless:
                yield
                return
            await self._servers.pause("in_place", updates=True)
            try:
                yield
            finally:
                await self._servers.resume()

    async def _catch_up(self, replica: Replica) -> None:
        async with self._lock:
            caught_up = await self._loader.catch_up(replica, paused=self._pause_mode is not None)
        self._changed.notify()
        self._drafting.on_server_up()
        if not caught_up:
            self._background.start(self._catch_up_later(replica))

    async def _catch_up_later(self, replica: Replica) -> None:
        """Retry until the server holds the engine's version, from here or from a newer load."""
        pause_s = FIRST_RETRY_S
        while replica.up and replica.version is None:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_RETRY_S)
            async with self._lock:
                try:
                    await self._loader.catch_up(replica, paused=self._pause_mode is not None)
                except (EngineFailed, ServerRefused) as error:
                    replica.mark_lost(f"it could not catch up: {error}")
            self._changed.notify()

"""One server of an engine: starts and restarts it, or attaches to it, and watches that its scheduler works."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from miles.addresses import free_port
from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused, ServerUnstartable
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.requests.batches import Batches, Events
from miles.services.rollout.engines.sglang.requests.concurrency import ConcurrencyLimit
from miles.services.rollout.engines.sglang.requests.server_choice import Candidate
from miles.services.rollout.engines.sglang.server import flags
from miles.services.rollout.engines.sglang.server.http_api import SglangApi
from miles.services.rollout.engines.sglang.server.probes import Load, Probe, ProbeTimes
from miles.services.rollout.engines.sglang.server.process import ServerProcess
from miles.services.rollout.engines.sglang.server.served_model import ServedModel
from miles.services.rollout.engines.sglang.weights.broadcast_member import ServerMember
from miles.services.rollout.engines.sglang.weights.checker import drain_device
from miles.services.rollout.engines.sglang.weights.update import WeightUpdate

log = logging.getLogger(__name__)

_READY_POLL_S = 0.25
ABORT_TIMEOUT_S = 20.0
"""The front process answers an abort at once; a caller that cancels a group does not wait for one that hangs."""
START_AGAIN_S = (2.0, 10.0)
"""Pauses before further attempts when a server ends during its first start."""
_FIRST_RESTART_S = 1.0
_LAST_RESTART_S = 60.0


class Replica:
    """Keeps one managed server running, or one connection to an attached server.

    `version` is set by `hold` once the server holds it, and becomes None again when the server is lost.
    """

    def __init__(
        self,
        options: SglangOptions,
        index: int,
        on_ready: Callable[[Replica], Awaitable[None]],
        on_change: Callable[[], None],
    ) -> None:
        """`on_ready` brings a restarted server to the engine's version; `on_change`: capacity may have changed."""
        self._options = options
        self._on_ready = on_ready
        self._on_change = on_change
        self.index = index
        self.managed = not options.addresses
        self.api = SglangApi("" if self.managed else options.addresses[index])
        self.model = ServedModel(options.hf_checkpoint)
        """What it starts from; its positions are to be set before `start`."""
        self.drafting: Mapping[str, Any] = {}
        """SGLang's flags of speculative decoding that follow from the job's; to be set before `start`."""
        self.version: int | None = None
        self._loads = 0
        self.ranks = options.gpus_per_engine if options.addresses else options.gpus_of(index)
        """Its tensor-parallel size; an attached server reports its own."""
        self.has_functions = self.managed and options.recipe is not None
        """Whether it can call those of `in_server`; an attached server reports its own."""
        self.batches = Batches(self._generate, self._post_abort)
        """Generates responses; requests that arrive together share a POST."""
        self.member: ServerMember | None = None
        """Its membership in the trainer's broadcasts; None while it is not up."""
        self.running = 0
        """Requests that the engine has given it and that have not ended."""
        self.limit = ConcurrencyLimit(options.concurrency)
        self._process: ServerProcess | None = None
        self._probe: Probe | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._lost: asyncio.Event = asyncio.Event()
        self._problem = ""
        self._exit_watch: asyncio.Task[None] | None = None
        self._paused = False
        self._scheduler_paused = False
        """Whether its scheduler was told to pause, which one that has nothing to do need not be."""
        self._progress_s = time.monotonic()
        """When its scheduler last made progress, or had nothing to do."""
        self._reported_at = 0.0

    @property
    def drains_by_function(self) -> bool:
        """Whether a function of `in_server` waits for its GPU, instead of a checksum of nothing.

        SGLang leaves no FP8 weights out of a checksum.
        """
        return self.has_functions and self._options.serves_fp8

    @property
    def drains_in_updates(self) -> bool:
        """Whether sessions of updates wait for its GPU, first and last; updates from files have none."""
        return self.drains_by_function and self._options.weight_path != "disk"

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"SGLang server {self.index} of {self._options.name}"

    @property
    def pid(self) -> int | None:
        """Of a managed server; None for an attached one."""
        return None if self._process is None else self._process.pid

    @property
    def up(self) -> bool:
        """Whether it is ready and answers."""
        return self._probe is not None and not self._lost.is_set()

    @property
    def cache_key(self) -> str:
        """Of requests to its present weights: no others share it, not even those of a version with the same number."""
        return f"v{self.version}.{self._loads}"

    def hold(self, version: int) -> None:
        """Note that the server holds a version now."""
        self.version = version
        self._loads += 1

    @property
    def holds_no_requests(self) -> bool:
        """Whether it surely has no requests; others may have some at an attached server."""
        return self.managed and not self.running

    def candidate(self) -> Candidate:
        """What the router needs to know of this server."""
        return Candidate(self.index, self.running, self.limit.limit, self.version)

    async def start(self) -> None:
        """Return once the server is ready. Raises ServerUnstartable.

        One that ends while it starts is tried again: its port may be taken, or the GPU's previous user may need
        seconds to free it.
        """
        for pause_s in START_AGAIN_S:
            try:
                await self._start_once()
                break
            except ServerUnstartable as error:
                if not error.ended:
                    raise
                log.warning("%s; trying again in %.0f s", error, pause_s)
                await asyncio.sleep(pause_s)
        else:
            await self._start_once()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"supervisor of {self.name}")

    async def close(self) -> None:
        """Stop a managed server; disconnect from an attached one."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._end_once()
        self.batches.close()

    def _generate(self, body: Mapping[str, Any], on_accepted: Callable[[], None]) -> Events:
        return self.api.generate(body, on_accepted)  # a restart replaces `api`

    def mark_lost(self, problem: str) -> None:
        """Treat the server as lost: its requests fail, and it is restarted or attached to again."""
        if not self._lost.is_set():
            self._problem = problem
            self.version = None
            self._lost.set()
            self.api.break_streams()
            self._on_change()

    async def _start_once(self) -> None:
        self._lost = asyncio.Event()
        self._paused = self._scheduler_paused = False
        began = time.monotonic()
        if self.managed:
            port = free_port()
            self.api = SglangApi(f"127.0.0.1:{port}")
            log_dir = self._options.log_dir
            log_path = None if log_dir is None else log_dir / f"{self._options.name}-sglang-{self.index}.log"
            self._process = await ServerProcess.start(
                flags.command(self._options, self.index, port, self.model, self.drafting), log_path
            )
        await self.api.open()
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._end_once)
            await self._wait_until_ready()
            await self._freeze_garbage()
            undo.pop_all()
        if self._process is not None:
            self._exit_watch = asyncio.create_task(self._watch_exit(self._process), name=f"exit of {self.name}")
        self.member = ServerMember(self.api, self.ranks)
        log.info("%s is ready at %s after %.1f s", self.name, self.api.address, time.monotonic() - began)
        times = ProbeTimes(self._options.probe_interval_s, self._options.silence_timeout_s, self._options.first_probe_s)
        self._probe = Probe(self.api.address, times, self._observe, self.mark_lost)
        self._probe.start()
        self._on_change()

    async def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._options.start_timeout_s
        problem = "it has not answered yet"
        while time.monotonic() < deadline:
            if self._process is not None and self._process.returncode is not None:
                code = self._process.returncode
                raise ServerUnstartable(f"{self.name} ended with status {code}; {self._process.log_tail()}", ended=True)
            try:
                answer = await self.api.get("/ready" if self.managed else "/server_info", timeout_s=10.0)
                self.ranks = int(answer.get("tp_size") or self.ranks)
                self.has_functions |= flags.has_functions(answer)
                return
            except (EngineFailed, ServerRefused) as error:
                problem = str(error)
            await asyncio.sleep(_READY_POLL_S)
        waited = f"waited {self._options.start_timeout_s:g} s for {self.name} to be ready: {problem}"
        tail = "" if self._process is None else "; " + self._process.log_tail()
        raise ServerUnstartable(waited + tail)

    async def _freeze_garbage(self) -> None:
        """Have a managed server's collector never search what it has loaded, which stays.

        It would do that itself after the warm-up that it leaves out; without it, it is slower at times.
        """
        if not self.managed:
            return
        try:
            await self.api.post("/freeze_gc", {}, self._options.call_timeout_s)
        except (EngineFailed, ServerRefused) as error:
            log.warning("%s does not freeze what it has loaded: %s", self.name, error)

    async def _end_once(self) -> None:
        self.version = None
        if self._exit_watch is not None:
            self._exit_watch.cancel()
            self._exit_watch = None
        if self.member is not None:
            self.member.close()
            self.member = None
        if self._probe is not None:
            self._probe.stop()
            self._probe = None
        await self.api.close()
        if self._process is not None:
            await self._process.stop()
            self._process = None

    async def _supervise(self) -> None:
        """Restart the server whenever it is lost, with growing pauses while that fails."""
        while True:
            await self._lost.wait()
            log.warning("%s is lost: %s", self.name, self._problem)
            await self._end_once()
            pause_s = _FIRST_RESTART_S
            while True:
                try:
                    await self._start_once()
                    await self._on_ready(self)
                    break
                except Exception as error:  # whatever it is, the server must not stay unsupervised
                    known = isinstance(error, ServerUnstartable | EngineFailed | ServerRefused)
                    log.warning("%s; trying again in %.0f s", error, pause_s, exc_info=None if known else error)
                    await self._end_once()
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LAST_RESTART_S)
            self._on_change()

    async def _watch_exit(self, process: ServerProcess) -> None:
        status = await process.wait()
        self.mark_lost(f"it ended with status {status}; {process.log_tail()}")

    def mark_progress(self) -> None:
        """Note that its scheduler makes progress: a response continued."""
        self._progress_s = time.monotonic()

    def _observe(self, load: Load) -> None:
        # The front process answers probes even while the scheduler behind it hangs.
        if self._paused or not self.running or load.at != self._reported_at:
            self.mark_progress()
        self._reported_at = load.at
        silent_s = time.monotonic() - self._progress_s
        if silent_s > self._options.hang_timeout_s:
            self.mark_lost(f"its scheduler has done nothing for its {self.running} requests for {silent_s:.0f} s")
        before = self.limit.limit
        self.limit.observe(cache_use=load.cache_use, running=load.running, waiting=load.waiting)
        if self.limit.limit != before:
            self._on_change()

    async def pause(self, mode: str, *, always: bool = False, updates: bool = False) -> None:
        """Have no step run until `resume`: mode in_place or retract. The caller gives it no request meanwhile.

        `updates`: nothing but an update or a checksum follows before `resume`, so that this need not wait for the GPU
        where they do.

        A server that surely has no requests is not called, unless `always`: it runs no step without one. A step that it
        had begun ahead for a response that has ended may still run, and nothing reads what it computes.
        """
        self._paused = True
        idle = self.holds_no_requests and not flags.may_compute_ahead(self._options.server_flags)
        if idle and not always and not self._scheduler_paused:
            return
        self._scheduler_paused = True
        await self.api.post("/pause_generation", {"mode": mode}, self._options.call_timeout_s)
        # To retract, a scheduler first waits for the step under way; an idle one has nothing left on its GPU then.
        if self._options.on_gpu and not (idle and mode == "retract") and not (updates and self.drains_in_updates):
            await self.drain()

    async def drain(self) -> None:
        """Return once its GPU has finished all its work; only while its scheduler is paused."""
        timeout_s = self._options.call_timeout_s
        if self.drains_by_function:
            await WeightUpdate(self.api, None, "draft", timeout_s, ranks=self.ranks).drain()
        else:
            await drain_device(self.api, timeout_s)

    async def resume(self) -> None:
        """Resume the scheduler, if it was told to pause.

        By default it would first give back to the driver what memory PyTorch keeps for the next step, which takes time
        within the pause, and again when the next responses need that memory.
        """
        if self._scheduler_paused:
            await self.api.post("/continue_generation", {"torch_empty_cache": False}, self._options.call_timeout_s)
        self._paused = self._scheduler_paused = False
        self.mark_progress()

    async def flush_cache(self) -> None:
        """Discard all keys and values; only while no request holds any."""
        await self.api.post("/flush_cache", {}, self._options.call_timeout_s)

    async def abort(self, rid: str) -> None:
        """End one request with the tokens it has. Raises EngineFailed when the server does not answer in time."""
        try:
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                await self.batches.abort(rid)
        except TimeoutError:
            raise EngineFailed(f"waited {ABORT_TIMEOUT_S:g} s for {self.name} to take request {rid}") from None

    async def _post_abort(self, rid: str) -> None:
        await self.api.post("/abort_request", {"rid": rid}, ABORT_TIMEOUT_S)

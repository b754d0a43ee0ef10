"""Whether an engine may serve: its weights, its pauses and its quarantine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

from miles.services.rollout.engines.base import EngineStats, PauseMode, RolloutEngine
from miles.services.rollout.serving.pauses import Pauses, Step
from miles.services.rollout.serving.version_gate import VersionGate
from miles.telemetry.tracing import traced

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ENGINE_SILENCE_S = 600.0
"""An engine with running requests that generates nothing for this long is taken to hang."""


class Serving:
    """Guards one engine, which is empty until its first load, then serving a version, paused, or quarantined.

    A quarantined engine is out of routing: the version gate is closed, and the worker's capacity is 0, until a full
    load and `serve`. `on_change` is called when the engine leaves or rejoins routing. `update_mode` says what new
    weights do to running requests.
    """

    def __init__(
        self, engine: RolloutEngine, on_change: Callable[[], None], update_mode: PauseMode = PauseMode.IN_PLACE
    ) -> None:
        self._update_mode = update_mode
        self.gate = VersionGate()
        self.quarantine_reason = ""
        """Why the engine is out of routing; empty while it may serve."""
        self.refused_weights = False
        """Whether that is because its model cannot take the weights, so that no retry helps."""
        self._engine = engine
        self._on_change = on_change
        self._pauses = Pauses()
        self._paused = False
        self._loaded_since_quarantine = False
        self._order = asyncio.Lock()
        self._last = EngineStats(0, 0, 0, 0.0)
        self._last_moved = time.monotonic()

    @property
    def version(self) -> int | None:
        """Version the engine holds; None before the first load."""
        return self._engine.version

    @property
    def device(self) -> torch.device:
        """Where new weights are best put before they are loaded."""
        return self._engine.device

    @property
    def paused(self) -> bool:
        """True while no step may run."""
        return self._paused

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        """Load a full set of weights; returns the pause time in seconds. `serve` then opens the gate.

        After a failed load the engine stays paused until one succeeds: its weights may be mixed.
        """
        async with self._order:
            async with self._held_on_failure():
                await self._engine.stage_weights(tensors)
            started = time.monotonic()
            if not self._paused and self._update_mode is not PauseMode.IN_PLACE:
                await self._engine.pause(self._update_mode)
                self._paused = True
            async with self._held_on_failure():
                loading_s = await self._engine.load_weights(version, tensors)
            self._loaded_since_quarantine = True
            if self._paused and self._pauses.operation_id is None:
                await self._engine.resume()
                self._paused = False
        return loading_s if self._update_mode is PauseMode.IN_PLACE else time.monotonic() - started

    @contextlib.asynccontextmanager
    async def _held_on_failure(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as error:
            await self._hold(error)
            raise

    async def _hold(self, error: BaseException) -> None:
        """Keep the engine paused after a failed load. If that fails too, the load's error is still the one to raise."""
        try:
            await self._engine.pause(PauseMode.IN_PLACE)
            self._paused = True
        except Exception as second:  # for example an engine that lost its server, which cannot generate either
            log.warning("a load failed (%s), and the engine could not be paused either: %s", error, second)

    def serve(self, version: int) -> None:
        """Let groups be generated with `version`. Does nothing in a quarantine without a full load since."""
        if self.quarantine_reason and not self._loaded_since_quarantine:
            return
        if self.quarantine_reason:
            log.info("version %d ends the quarantine: %s", version, self.quarantine_reason)
        self.quarantine_reason, self.refused_weights = "", False
        self._pauses.loaded()
        self.gate.open(version)
        self._on_change()

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        """The parameters as served, by HF name."""
        return await self._engine.weight_bytes()

    def quarantine(self, reason: str, *, refused: bool = False) -> None:
        """Leave routing until the next full load. The first reason counts, of each kind: `refused` or not."""
        if self.quarantine_reason and refused == self.refused_weights:
            return
        log.warning("the engine leaves routing: %s", reason)
        self.refused_weights = refused
        self._loaded_since_quarantine = False
        self.quarantine_reason = reason
        self.gate.close()
        self._on_change()

    async def pause(self, mode: PauseMode, operation_id: str, token_ttl_s: float) -> float:
        """Pause for an operation; returns the time until no step was running, in seconds. Raises PauseRefused."""
        started = time.monotonic()
        async with self._order:
            if self._pauses.pause(operation_id, token_ttl_s, started) is Step.NOTHING:
                return 0.0
            try:
                await self._engine.pause(mode)
            except BaseException:
                self._pauses.failed()
                raise
            self._paused = True
        return time.monotonic() - started

    async def resume(self, operation_id: str) -> None:
        """End an operation's pause. Raises PauseRefused."""
        async with self._order:
            if self._pauses.resume(operation_id) is Step.RESUME:
                await self._engine.resume()
                self._paused = False

    @traced("release memory")
    async def release_memory(self) -> tuple[int, float]:
        """Free the engine's memory until a resume or new weights; returns bytes of GPU memory and seconds."""
        started = time.monotonic()
        async with self._order:
            released = await self._engine.release_memory()
        return released, time.monotonic() - started

    def tick(self) -> None:
        """Quarantine an engine whose pause token has expired or that hangs; call about once a second."""
        now = time.monotonic()
        if self._pauses.tick(now):
            self.quarantine(self._pauses.expired)
        stats = self._engine.stats()
        idle = not stats.running_requests or self._paused
        if idle or (stats.generated_tokens, stats.busy_s) != (self._last.generated_tokens, self._last.busy_s):
            self._last_moved = now
        elif now - self._last_moved > ENGINE_SILENCE_S:
            self.quarantine(f"the engine has generated nothing for {ENGINE_SILENCE_S:.0f} s for its running requests")
        self._last = stats

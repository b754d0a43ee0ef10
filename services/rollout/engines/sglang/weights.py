"""Brings every server to one version, together."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from miles.services.rollout.engines.sglang import buckets, flags, updates
from miles.services.rollout.engines.sglang.active import Signal
from miles.services.rollout.engines.sglang.buckets import NamedTensor
from miles.services.rollout.engines.sglang.errors import EngineFailed, ServerRefused
from miles.services.rollout.engines.sglang.layout import ModelLayout, misfits, read_layout
from miles.services.rollout.engines.sglang.names import checkpoint_names
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.replica import Replica
from miles.services.rollout.engines.sglang.staging import StagedWeights
from miles.services.rollout.engines.sglang.updates import Selector, WeightUpdate
from miles.weights.manifest import ChecksumMismatch

log = logging.getLogger(__name__)

_MEMORY_TAGS = ("kv_cache", "weights")


class WeightLoader:
    """Loads versions into the servers that are up; one that fails is given up, the load fails when none is left."""

    def __init__(self, options: SglangOptions, replicas: Sequence[Replica], changed: Signal) -> None:
        """`changed` fires when a server comes up or goes."""
        self._options = options
        self._replicas = replicas
        self._changed = changed
        self._layout = ModelLayout({}, 0, 0)
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        own_draft = flags.has_draft_weights(options.server_flags)
        self._selector: Selector = "target" if own_draft else "all"
        self._draft: dict[str, torch.Tensor] = {}
        self._released = False
        self.tensors: Mapping[str, torch.Tensor] = {}
        """What the servers hold, by HF name."""
        self.version: int | None = None

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self._layout.vocabulary

    @property
    def max_positions(self) -> int:
        """Positions that the model was made for."""
        return self._layout.max_positions

    async def prepare(self) -> None:
        """Learn what the model's parameters are."""
        buckets.share_by_name()
        self._layout = await asyncio.to_thread(read_layout, self._options.hf_checkpoint)
        for replica in self._replicas:
            replica.max_positions = self._layout.max_positions

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError when these are not the model's parameters."""
        faults = misfits(self._layout.shapes, tensors, self._dtype)
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise ValueError(f"the weights do not fit the model: {'; '.join(faults[:5])}{more}")

    async def pause(self, mode: str) -> None:
        """Stop every scheduler."""
        await self._on_each(await self._up(), lambda replica: replica.pause(mode), "pause")

    async def resume(self) -> None:
        """Let every scheduler go on."""
        await self._on_each(await self._up(), lambda replica: replica.resume(), "go on")

    async def load(self, version: int, tensors: Mapping[str, torch.Tensor], *, flush: bool) -> None:
        """Load a version into paused servers; with `flush`, also forget their caches."""
        replicas = await self._up()
        for replica in replicas:
            replica.version = None
        if self._released:
            await self._memory(replicas, "resume", ("weights",))
        await self._push(replicas, version, self._named(tensors), self._selector)
        self.version, self.tensors = version, tensors
        if self._released:
            await self._memory(replicas, "resume", ("kv_cache",))
            self._released = False
        elif flush:
            await self._on_each(replicas, lambda replica: replica.flush_cache(), "flush its cache")
        for replica in replicas:
            if replica.up:
                replica.version = version

    async def load_draft(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the draft model's weights into paused servers."""
        await self._push(await self._up(), None, list(tensors.items()), "draft")
        self._draft = dict(tensors)

    async def catch_up(self, replica: Replica, *, paused: bool) -> None:
        """Bring a server that was started anew to what the others hold."""
        if self.version is None or replica.version == self.version:
            return
        await replica.pause("in_place")
        await self._push([replica], self.version, self._named(self.tensors), self._selector)
        if self._draft:
            await self._push([replica], None, list(self._draft.items()), "draft")
        if not paused:
            await replica.resume()
        replica.version = self.version

    async def verify(self) -> None:
        """Raise ChecksumMismatch unless every paused server holds exactly `tensors`."""
        replicas, timeout_s = await self._up(), self._options.order_timeout_s

        async def overwrite(replica: Replica) -> str:
            before = await updates.checksum(replica.api, self._selector, timeout_s)
            reset = {"action": "reset_tensors", "selector": self._selector}
            await replica.api.post("/weights_checker", reset, timeout_s)
            return before

        before = await asyncio.gather(*(overwrite(replica) for replica in replicas))
        await self._push(replicas, self.version, self._named(self.tensors), self._selector)
        after = await asyncio.gather(*(updates.checksum(r.api, self._selector, timeout_s) for r in replicas))
        wrong = [r.name for r, old, new in zip(replicas, before, after, strict=True) if old != new]
        if wrong:
            raise ChecksumMismatch(f"{', '.join(wrong)} did not hold the weights of version {self.version}")

    async def release_memory(self) -> None:
        """Have paused servers free their weights and caches."""
        if not self._released:
            await self._memory(await self._up(), "release", _MEMORY_TAGS)
            self._released = True

    async def restore_memory(self) -> None:
        """Give servers their memory and the last weights back."""
        if self._released and self.version is not None:
            await self.load(self.version, self.tensors, flush=False)

    async def _memory(self, replicas: Sequence[Replica], what: str, tags: Sequence[str]) -> None:
        async def order(replica: Replica) -> None:
            body: dict[str, Any] = {"tags": list(tags)}
            await replica.api.post(f"/{what}_memory_occupation", body, self._options.order_timeout_s)

        await self._on_each(replicas, order, f"{what} memory")

    def _named(self, tensors: Mapping[str, torch.Tensor]) -> list[NamedTensor]:
        aliases = self._layout.aliases.items()
        return [*tensors.items(), *((alias, tensors[name]) for alias, name in aliases)]

    async def _push(
        self, replicas: Sequence[Replica], version: int | None, tensors: list[NamedTensor], selector: Selector
    ) -> None:
        # Where tensors lie in one allocation of a GPU, the bucket is that one, and nothing is copied.
        limit = sys.maxsize if buckets.are_together(tensors) else self._options.bucket_bytes
        parts = list(buckets.in_buckets(checkpoint_names(tensors), limit))
        if self._options.weight_path == "disk" and selector != "draft":
            await self._push_files(replicas, version, parts)
            return
        staged = StagedWeights(parts, len(replicas))
        timeout_s = self._options.order_timeout_s
        ranks = self._options.gpus_per_engine if self._options.on_gpu else 1

        async def update(replica: Replica) -> None:
            await WeightUpdate(replica.api, version, selector, timeout_s).from_tensors(staged.buckets(), ranks)
            if self._options.on_gpu:
                await updates.drain_device(replica.api, timeout_s)

        await self._on_each(replicas, update, f"load version {version}")

    async def _push_files(
        self, replicas: Sequence[Replica], version: int | None, parts: Sequence[Sequence[NamedTensor]]
    ) -> None:
        root = self._options.weight_dir
        folder = Path(tempfile.mkdtemp(prefix=f"{self._options.name}-weights-", dir=root))
        try:
            await updates.write_files(folder / str(version), parts)

            async def update(replica: Replica) -> None:
                push = WeightUpdate(replica.api, version, "all", self._options.order_timeout_s)
                await push.from_files(folder / str(version))

            await self._on_each(replicas, update, f"load version {version}")
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _on_each(
        self, replicas: Sequence[Replica], order: Callable[[Replica], Awaitable[None]], what: str
    ) -> None:
        """Carry out an order on every server; those that fail are given up. Raises when all of them do."""
        outcomes = await asyncio.gather(*(order(replica) for replica in replicas), return_exceptions=True)
        failed = [(r, e) for r, e in zip(replicas, outcomes, strict=True) if isinstance(e, BaseException)]
        for replica, error in failed:
            if not isinstance(error, EngineFailed | ServerRefused):
                raise error
            log.warning("%s could not %s: %s", replica.name, what, error)
            replica.give_up(f"it could not {what}: {error}")
        if failed and len(failed) == len(replicas):
            raise EngineFailed(f"no SGLang server could {what}: {failed[0][1]}") from failed[0][1]

    async def _up(self) -> list[Replica]:
        """The servers that are up; waits for the first one. Raises EngineFailed when none comes up in time."""
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                while not (up := [replica for replica in self._replicas if replica.up]):
                    await self._changed.wait()
        except TimeoutError:
            raise EngineFailed(f"waited {self._options.start_timeout_s:g} s for an SGLang server to be up") from None
        return up

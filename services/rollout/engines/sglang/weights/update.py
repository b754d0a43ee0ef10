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

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.requests.active import Signal
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.speculative.draft import own_parameters
from miles.services.rollout.engines.sglang.weights import buckets
from miles.services.rollout.engines.sglang.weights import session as updates
from miles.services.rollout.engines.sglang.weights.buckets import NamedTensor
from miles.services.rollout.engines.sglang.weights.layout import ModelLayout, misfits, read_layout, refuse
from miles.services.rollout.engines.sglang.weights.names import checkpoint_names
from miles.services.rollout.engines.sglang.weights.remote import RemoteWeights
from miles.services.rollout.engines.sglang.weights.session import Checksum, Selector, WeightUpdate
from miles.services.rollout.engines.sglang.weights.staging import StagedWeights
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
        self._selector: Selector = "all"
        self._draft_algorithm = ""
        self._draft: Mapping[str, torch.Tensor] = {}
        self._sums: dict[Selector, tuple[bytes, str]] = {}
        """Of the last version that servers took by broadcast: its manifest's checksum, and theirs."""
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

    def keep_draft_apart(self, algorithm: str) -> None:
        """The servers have a draft model with weights of its own: the policy's versions are not for it."""
        self._selector, self._draft_algorithm = "target", algorithm

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError when these are not the model's parameters."""
        refuse(misfits(self._layout.shapes, tensors, self._dtype), "model")

    async def pause(self, mode: str) -> None:
        """Stop every scheduler."""
        await self._on_each(await self._up(), lambda replica: replica.pause(mode), "pause")

    async def resume(self) -> None:
        """Let every scheduler go on."""
        await self._on_each(await self._up(), lambda replica: replica.resume(), "go on")

    async def load(self, version: int, tensors: Mapping[str, torch.Tensor], *, flush: bool) -> None:
        """Load a version into paused servers; with `flush`, also forget their caches.

        Whatever is raised, no server counts as holding a version any more.
        """
        replicas = await self._up()
        for replica in replicas:
            replica.version = None
        if self._released:
            await self._memory(replicas, "resume", ("weights",))
        await self._push(replicas, version, tensors, self._selector)
        self.version, self.tensors = version, tensors
        if self._released:
            if self._draft:
                await self._push(replicas, None, self._draft, "draft")
            await self._memory(replicas, "resume", ("kv_cache",))
            self._released = False
        elif flush:
            await self._on_each(replicas, lambda replica: replica.flush_cache(), "flush its cache")
        for replica in replicas:
            if replica.up:
                replica.version = version

    async def load_draft(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the draft model's weights into paused servers; while their memory is released, once they have it."""
        own = own_parameters(tensors, self._draft_algorithm, self._layout.shapes)
        if not self._released:
            await self._push(await self._up(), None, own, "draft")
        self._draft = own

    async def verify_draft(self) -> None:
        """Raise ChecksumMismatch when a paused server's draft model is another one after the same load again.

        Nothing is overwritten with noise here, as parts of a draft may be the policy's.
        """
        if self._released or not self._draft:
            return
        replicas, timeout_s = await self._up(), self._options.order_timeout_s
        before = await asyncio.gather(*(updates.checksum(r.api, "draft", timeout_s) for r in replicas))
        await self._push(replicas, None, self._draft, "draft")
        after = await asyncio.gather(*(updates.checksum(r.api, "draft", timeout_s) for r in replicas))
        wrong = [r.name for r, old, new in zip(replicas, before, after, strict=True) if old != new or not new.names]
        if wrong:
            raise ChecksumMismatch(f"{', '.join(wrong)} did not hold the last weights of the draft model, or has none")

    async def catch_up(self, replica: Replica, *, paused: bool) -> bool:
        """Bring a server that was started anew to what the others hold; False while the trainer cannot be reached.

        Raises EngineFailed or ServerRefused when the server fails.
        """
        if self.version is None or replica.version == self.version:
            return True
        await replica.pause("in_place")
        try:
            await self._push([replica], self.version, self.tensors, self._selector)
            if self._draft:
                await self._push([replica], None, self._draft, "draft")
        except (ConnectionError, TimeoutError) as error:
            log.warning("%s cannot be brought to version %d: %s", replica.name, self.version, error)
            return False
        except ChecksumMismatch as error:
            raise EngineFailed(str(error)) from error
        if not paused:
            await replica.resume()
        replica.version = self.version
        return True

    async def verify(self) -> Mapping[str, torch.Tensor]:
        """Raise ChecksumMismatch unless every paused server holds exactly `tensors`; returns them, with their bytes.

        Weights that went past this process come here now, by a broadcast of their own, and are verified.
        """
        tensors = self.tensors
        if isinstance(tensors, RemoteWeights):
            tensors = (await asyncio.to_thread(tensors.fetch)).tensors
        replicas, timeout_s = await self._up(), self._options.order_timeout_s

        async def overwrite(replica: Replica) -> Checksum:
            before = await updates.checksum(replica.api, self._selector, timeout_s)
            reset = {"action": "reset_tensors", "selector": self._selector}
            await replica.api.post("/weights_checker", reset, timeout_s)
            return before

        # Memory can be shared with servers of this host alone; others are sent the same broadcast again.
        near = all(replica.managed for replica in replicas)
        try:
            before = await asyncio.gather(*(overwrite(replica) for replica in replicas))
            await self._push(replicas, self.version, tensors if near else self.tensors, self._selector)
        except BaseException as error:
            for replica in replicas:  # nobody may be served by noise
                replica.give_up(f"it was overwritten for a check, and could not be loaded again: {error!r}")
            raise
        after = await asyncio.gather(*(updates.checksum(r.api, self._selector, timeout_s) for r in replicas))
        wrong = [r.name for r, old, new in zip(replicas, before, after, strict=True) if old != new]
        if wrong:
            raise ChecksumMismatch(f"{', '.join(wrong)} did not hold the weights of version {self.version}")
        return tensors

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
        self, replicas: Sequence[Replica], version: int | None, tensors: Mapping[str, torch.Tensor], selector: Selector
    ) -> None:
        if isinstance(tensors, RemoteWeights):
            await self._push_remote(replicas, version, tensors, selector)
            return
        named = list(tensors.items()) if selector == "draft" else self._named(tensors)
        # Where tensors lie in one allocation of a GPU, the bucket is that one, and nothing is copied.
        limit = sys.maxsize if buckets.are_together(named) else self._options.bucket_bytes
        parts = list(buckets.in_buckets(checkpoint_names(named), limit))
        if self._options.weight_path == "disk" and selector != "draft":
            await self._push_files(replicas, version, parts)
            return
        staged = StagedWeights(parts, len(replicas))
        timeout_s = self._options.order_timeout_s

        async def update(replica: Replica) -> None:
            await WeightUpdate(replica.api, version, selector, timeout_s).from_tensors(staged.buckets(), replica.ranks)
            if self._options.on_gpu:
                await updates.drain_device(replica.api, timeout_s)

        if selector == "draft":  # a server that refuses a draft serves the policy as before
            await self._on_each(replicas, update, "load its draft model", blamed=(EngineFailed,))
        else:
            await self._on_each(replicas, update, f"load version {version}")

    async def _push_remote(
        self, replicas: Sequence[Replica], version: int | None, weights: RemoteWeights, selector: Selector
    ) -> None:
        """Have the servers take a version from the trainer's ranks; ChecksumMismatch unless all hold the same then."""
        timeout_s = self._options.order_timeout_s
        found: dict[str, Checksum] = {}

        async def update(replica: Replica) -> None:
            if replica.member is None:
                raise EngineFailed(f"{replica.name} was lost before it could take the weights")
            push = WeightUpdate(replica.api, version, selector, timeout_s)
            await push.from_sources(replica.member, weights)
            if self._options.on_gpu:
                await updates.drain_device(replica.api, timeout_s)
            found[replica.name] = await updates.checksum(replica.api, selector, timeout_s)

        await self._on_each(replicas, update, f"take version {version} from the trainer")
        apart = self._layout.aliases.keys() & set().union(*(checksum.names for checksum in found.values()))
        if apart and selector != "draft":
            raise ValueError(
                f"SGLang keeps {', '.join(sorted(apart))} apart from what it is tied to, and a broadcast brings tied "
                "parameters once; set rollout_engine_weights = tensor"
            )
        known, expected = self._sums.get(selector, (b"", ""))
        if known != weights.manifest.checksum:
            expected = next(iter(found.values())).value
        wrong = [name for name, checksum in found.items() if checksum.value != expected]
        if wrong:
            raise ChecksumMismatch(f"{', '.join(wrong)} took other weights than others did of version {version}")
        self._sums[selector] = (weights.manifest.checksum, expected)

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
        self,
        replicas: Sequence[Replica],
        order: Callable[[Replica], Awaitable[None]],
        what: str,
        blamed: tuple[type[Exception], ...] = (EngineFailed, ServerRefused),
    ) -> None:
        """Carry out an order on every server; those that fail are given up, for errors that are `blamed` on them.

        Raises when all of them do, and for any other error.
        """
        outcomes = await asyncio.gather(*(order(replica) for replica in replicas), return_exceptions=True)
        failed = [(r, e) for r, e in zip(replicas, outcomes, strict=True) if isinstance(e, BaseException)]
        for replica, error in failed:
            if isinstance(error, blamed):
                log.warning("%s could not %s: %s", replica.name, what, error)
                replica.give_up(f"it could not {what}: {error}")
        for _, error in failed:  # what is not the servers' fault
            if not isinstance(error, blamed):
                raise error
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

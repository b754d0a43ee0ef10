"""Loads one version into all servers of an engine, and proves on demand that they hold it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.server.group import ServerGroup
from miles.services.rollout.engines.sglang.server.replica import Replica
from miles.services.rollout.engines.sglang.speculative.draft import own_parameters
from miles.services.rollout.engines.sglang.weights import checker
from miles.services.rollout.engines.sglang.weights.buckets import NamedTensor, share_by_name
from miles.services.rollout.engines.sglang.weights.checker import Checksum, Selector
from miles.services.rollout.engines.sglang.weights.files import written
from miles.services.rollout.engines.sglang.weights.gpu_buckets import GpuBuckets
from miles.services.rollout.engines.sglang.weights.layout import ModelLayout, read_layout
from miles.services.rollout.engines.sglang.weights.model_folder import model_to_serve
from miles.services.rollout.engines.sglang.weights.remote import RemoteWeights
from miles.services.rollout.engines.sglang.weights.staging import StagedWeights
from miles.services.rollout.engines.sglang.weights.update import WeightUpdate
from miles.weights.base import WeightsRefused
from miles.weights.manifest import ChecksumMismatch

log = logging.getLogger(__name__)

_MEMORY_TAGS = ("kv_cache", "weights")


class WeightLoader:
    """Loads versions into the servers that are up; one that fails is lost, and a load fails when none is left."""

    def __init__(self, options: SglangOptions, servers: ServerGroup) -> None:
        self._options = options
        self._servers = servers
        self._layout = ModelLayout({}, 0, 0)
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        self._selector: Selector = "all"
        self._draft_algorithm = ""
        self._draft_config: Mapping[str, Any] = {}
        self._draft: Mapping[str, torch.Tensor] = {}
        self._sums: dict[Selector, tuple[bytes, str]] = {}
        """For the last version received by broadcast: its manifest's checksum, and that of the servers."""
        self._released = False
        self._gpu_buckets = GpuBuckets()
        self._files = contextlib.ExitStack()
        """Holds the folder that describes the model to servers, if they need one."""
        self.tensors: Mapping[str, torch.Tensor] = {}
        """The weights that the servers hold, by HF name."""
        self.version: int | None = None

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self._layout.vocabulary

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the tensors of a version, by name, before matrices are quantised."""
        return self._layout.shapes

    @property
    def max_positions(self) -> int:
        """Positions that the model was made for."""
        return self._layout.max_positions

    async def prepare(self) -> None:
        """Read the layout of the model's parameters."""
        share_by_name()
        given = self._options
        self._layout = await asyncio.to_thread(
            read_layout, given.hf_checkpoint, given.contract, given.recipe, self._dtype
        )
        model = await asyncio.to_thread(model_to_serve, self._options, self._layout, self._files)
        for replica in self._servers.replicas:
            replica.model = model

    def close(self) -> None:
        """Remove what servers were started from."""
        self._gpu_buckets.close()
        self._files.close()

    def keep_draft_apart(self, algorithm: str, config: Mapping[str, Any]) -> None:
        """Load the policy's versions into the policy only: the servers have a draft model with weights of its own.

        `config`: the draft model's config.json.
        """
        self._selector, self._draft_algorithm, self._draft_config = "target", algorithm, config

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise WeightsRefused when these are not the tensors that the trainer is to publish."""
        self._layout.refuse_misfits(tensors, self._dtype)

    async def stage(self, tensors: Mapping[str, torch.Tensor]) -> StagedWeights | None:
        """Make ready what `load` hands to the servers, while they may still generate; None when there is nothing.

        Nothing is made while the servers' memory is released, which they are to find free when they take it back. The
        caller closes it.
        """
        if isinstance(tensors, RemoteWeights) or self._released:
            return None
        staged = await asyncio.to_thread(self._staged, tensors, self._selector)
        async with contextlib.AsyncExitStack() as on_failure:
            on_failure.push_async_callback(staged.close)
            if self._options.weight_path != "disk":
                await staged.stage([self._gpu_of(replica) for replica in self._servers.replicas if replica.up])
            on_failure.pop_all()
        return staged

    async def load(
        self,
        version: int,
        tensors: Mapping[str, torch.Tensor],
        *,
        flush: bool,
        staged: StagedWeights | None = None,
    ) -> None:
        """Load a version into paused servers, from what `stage` made of it, if it did.

        `flush` also the caches of those that hold requests, which must not find what older weights computed.

        When this raises, no server counts as holding a version any more.
        """
        replicas = await self._servers.up()
        for replica in replicas:
            replica.version = None
        if self._released:
            await self._memory(replicas, "resume", ("weights",))
        await self._push(replicas, version, tensors, self._selector, staged)
        self.version, self.tensors = version, tensors
        if self._released:
            if self._draft:
                await self._push(replicas, None, self._draft, "draft")
            await self._memory(replicas, "resume", ("kv_cache",))
            self._released = False
        elif flush:
            holding = [replica for replica in replicas if not replica.holds_no_requests]
            await self._servers.call_each(holding, lambda replica: replica.flush_cache(), "flush its cache")
        for replica in replicas:
            if replica.up:
                replica.hold(version)

    async def load_draft(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the draft model's weights into paused servers; if their memory is released, once it is restored."""
        own = own_parameters(tensors, self._draft_algorithm, self._draft_config, self._layout.shapes)
        if not self._released:
            await self._push(await self._servers.up(), None, own, "draft")
        self._draft = own

    async def verify_draft(self) -> None:
        """Raise ChecksumMismatch when loading the same draft again changes a paused server's draft model.

        Nothing is overwritten with noise here, because parts of a draft may be the policy's.
        """
        if self._released or not self._draft:
            return
        replicas, timeout_s = await self._servers.up(), self._options.call_timeout_s
        before = await asyncio.gather(*(checker.checksum(r.api, "draft", timeout_s) for r in replicas))
        await self._push(replicas, None, self._draft, "draft")
        after = await asyncio.gather(*(checker.checksum(r.api, "draft", timeout_s) for r in replicas))
        wrong = [r.name for r, old, new in zip(replicas, before, after, strict=True) if old != new or not new.names]
        if wrong:
            raise ChecksumMismatch(f"{', '.join(wrong)} did not hold the last weights of the draft model, or has none")

    async def catch_up(self, replica: Replica, *, paused: bool) -> bool:
        """Bring a restarted server to the version that the others hold; False while the trainer cannot be reached.

        Raises EngineFailed or ServerRefused when the server fails.
        """
        if self.version is None or replica.version == self.version:
            return True
        await replica.pause("in_place", updates=True)
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
        replica.hold(self.version)
        return True

    async def verify(self) -> Mapping[str, torch.Tensor]:
        """Raise ChecksumMismatch unless every paused server holds exactly `tensors`; return them, with their bytes.

        Weights that bypassed this process are fetched now, by a broadcast of their own, and verified.
        """
        tensors = self.tensors
        if isinstance(tensors, RemoteWeights):
            tensors = (await asyncio.to_thread(tensors.fetch)).tensors
        replicas, timeout_s = await self._servers.up(), self._options.call_timeout_s

        async def overwrite(replica: Replica) -> Checksum:
            before = await checker.checksum(replica.api, self._selector, timeout_s)
            await checker.overwrite_with_noise(replica.api, self._selector, timeout_s)
            return before

        # Memory can be shared only with servers of this host; others receive the same broadcast again.
        near = all(replica.managed for replica in replicas)
        try:
            before = await asyncio.gather(*(overwrite(replica) for replica in replicas))
            await self._push(replicas, self.version, tensors if near else self.tensors, self._selector)
        except BaseException as error:
            for replica in replicas:  # they hold noise, and must not serve it
                replica.mark_lost(f"it was overwritten for a check, and could not be loaded again: {error!r}")
            raise
        after = await asyncio.gather(*(checker.checksum(r.api, self._selector, timeout_s) for r in replicas))
        wrong = [r.name for r, old, new in zip(replicas, before, after, strict=True) if old != new]
        if wrong:
            raise ChecksumMismatch(f"{', '.join(wrong)} did not hold the weights of version {self.version}")
        return tensors

    async def release_memory(self) -> None:
        """Have paused servers free their weights and caches."""
        if not self._released:
            await self._memory(await self._servers.up(), "release", _MEMORY_TAGS)
            self._released = True

    async def restore_memory(self) -> None:
        """Restore the servers' memory with the last weights."""
        if self._released and self.version is not None:
            await self.load(self.version, self.tensors, flush=False)

    async def _memory(self, replicas: Sequence[Replica], what: str, tags: Sequence[str]) -> None:
        async def call(replica: Replica) -> None:
            body: dict[str, Any] = {"tags": list(tags)}
            await replica.api.post(f"/{what}_memory_occupation", body, self._options.call_timeout_s)

        await self._servers.call_each(replicas, call, f"{what} memory")

    def _named(self, tensors: Mapping[str, torch.Tensor]) -> list[NamedTensor]:
        aliases = self._layout.aliases.items()
        return [*tensors.items(), *((alias, tensors[name]) for alias, name in aliases if alias not in tensors)]

    def _staged(self, tensors: Mapping[str, torch.Tensor], selector: Selector) -> StagedWeights:
        named = list(tensors.items()) if selector == "draft" else self._named(tensors)
        return StagedWeights(named, self._options.bucket_bytes, self._gpu_buckets)

    def _gpu_of(self, replica: Replica) -> torch.device | None:
        """The GPU on which a server reads buckets; None: it reads them in host memory, or where the tensors are.

        Each rank of a larger server copies its own part from the host, and an attached server's GPU is not known.
        """
        if not self._options.on_gpu or not replica.managed or replica.ranks > 1:
            return None
        return torch.device("cuda", self._options.first_gpu_of(replica.index))

    async def _push(
        self,
        replicas: Sequence[Replica],
        version: int | None,
        tensors: Mapping[str, torch.Tensor],
        selector: Selector,
        staged: StagedWeights | None = None,
    ) -> None:
        if isinstance(tensors, RemoteWeights):
            await self._push_remote(replicas, version, tensors, selector)
            return
        async with contextlib.AsyncExitStack() as at_end:
            if staged is None:
                staged = self._staged(tensors, selector)
                at_end.push_async_callback(staged.close)
            if self._options.weight_path == "disk" and selector != "draft":
                await self._push_files(replicas, version, staged.parts)
            else:
                await self._push_buckets(replicas, version, selector, staged)

    async def _push_buckets(
        self, replicas: Sequence[Replica], version: int | None, selector: Selector, ready: StagedWeights
    ) -> None:
        readers = await ready.join([self._gpu_of(replica) for replica in replicas])
        reader_of = dict(zip(replicas, readers, strict=True))

        async def update(replica: Replica) -> None:
            with reader_of[replica] as reader:
                await self._update(replica, version, selector).from_tensors(reader.buckets())
            if ready.copied_on_gpu and not replica.drains_in_updates:
                await replica.drain()

        if selector == "draft":  # a server that refuses a draft serves the policy as before
            await self._servers.call_each(replicas, update, "load its draft model", blamed=(EngineFailed,))
        else:
            await self._servers.call_each(replicas, update, f"load version {version}")

    def _update(self, replica: Replica, version: int | None, selector: Selector) -> WeightUpdate:
        repacks, timeout_s = self._options.repacks and selector != "draft", self._options.call_timeout_s
        return WeightUpdate(
            *(replica.api, version, selector, timeout_s),
            ranks=replica.ranks,
            repacks=repacks,
            drains=replica.drains_in_updates,
        )

    async def _push_remote(
        self, replicas: Sequence[Replica], version: int | None, weights: RemoteWeights, selector: Selector
    ) -> None:
        """Have the servers receive a version from the trainer's ranks; ChecksumMismatch unless all hold the same."""
        timeout_s = self._options.call_timeout_s
        found: dict[str, Checksum] = {}

        async def update(replica: Replica) -> None:
            if replica.member is None:
                raise EngineFailed(f"{replica.name} was lost before it could receive the weights")
            push = self._update(replica, version, selector)
            await push.from_sources(replica.member, weights)
            if self._options.on_gpu and not replica.drains_in_updates:
                await replica.drain()
            found[replica.name] = await checker.checksum(replica.api, selector, timeout_s)

        await self._servers.call_each(replicas, update, f"receive version {version} from the trainer")
        unsent = self._layout.aliases.keys() - weights.keys()
        apart = unsent & set().union(*(checksum.names for checksum in found.values()))
        if apart and selector != "draft":
            raise WeightsRefused(
                f"SGLang keeps {', '.join(sorted(apart))} apart from what it is tied to, and a broadcast sends tied "
                "parameters once; set rollout_engine_weights = tensor"
            )
        known, expected = self._sums.get(selector, (b"", ""))
        if known != weights.manifest.checksum:
            expected = next(iter(found.values())).value
        wrong = [name for name, checksum in found.items() if checksum.value != expected]
        if wrong:
            raise ChecksumMismatch(
                f"{', '.join(wrong)} received other weights than the others did of version {version}"
            )
        self._sums[selector] = (weights.manifest.checksum, expected)

    async def _push_files(
        self, replicas: Sequence[Replica], version: int | None, parts: Sequence[Sequence[NamedTensor]]
    ) -> None:
        name = f"{self._options.name}-weights-"
        async with written(self._options.weight_dir, name, str(version), parts) as folder:
            await self._servers.call_each(
                replicas,
                lambda replica: self._update(replica, version, "all").from_files(folder),
                f"load version {version}",
            )

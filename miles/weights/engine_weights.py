"""The versions that one engine has received: the prefetched one, the served one, and those that were replaced."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.telemetry.tracing import traced
from miles.weights import manifest as manifests
from miles.weights.adapters.merging import AdaptedWeights, AdapterBase
from miles.weights.base import Endpoint, ReceivedWeights, WeightReceiver, WeightsRefused
from miles.weights.check import check_weight_update_equal
from miles.weights.manifest import ManifestError

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2 import TransportKind

_RELEASE_GRACE_S = 0.5
_RELEASE_POLL_S = 0.05


class WeightTarget(Protocol):
    """The part of RolloutEngine that weight updates need."""

    @property
    def version(self) -> int | None:
        """Version served now; None before the first `load_weights`."""

    @property
    def device(self) -> torch.device:
        """Where to put the weights; transports through host memory ignore it."""

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        """Swap in a full set of weights; return the pause time, in seconds. WeightsRefused when they do not fit."""

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        """The parameters as served, by HF name."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ReceivedVersion:
    """A version that was received: prefetched, served, or replaced."""

    publication_id: int
    version: int
    checksum: bytes
    """Of its manifest."""
    received: ReceivedWeights


class EngineWeights:
    """Carries out the orders that move weights; one order at a time, on the event loop.

    Receiving, verifying and merging block a worker thread instead of the loop.
    """

    def __init__(
        self,
        address: str,
        target: WeightTarget,
        create_receiver: Callable[[TransportKind.ValueType, Endpoint], WeightReceiver],
        base: AdapterBase | None,
    ) -> None:
        """`address` is host:port of the service; adapters are merged into `base` (None: they are refused)."""
        self._address = address
        self._target = target
        self._create_receiver = create_receiver
        self._base = base
        self._receivers: dict[int, WeightReceiver] = {}
        self._prefetched: ReceivedVersion | None = None
        self._replaced: list[ReceivedVersion] = []
        """Versions not released yet, because the engine may still hold tensors of them."""
        self.served: ReceivedVersion | None = None
        """None before the first swap, and while a swap is under way."""

    @traced("prefetch weights")
    async def prefetch(self, order: weightsync_pb2.PrefetchOrder) -> None:
        """Receive and verify a version, and merge it if it is an adapter."""
        if self._prefetched is not None:
            self._replaced.append(self._prefetched)
            self._prefetched = None
        kind = order.handle.kind
        if kind not in self._receivers:
            self._receivers[kind] = self._create_receiver(kind, Endpoint(self._address, self._target.device))
        received = await asyncio.to_thread(self._receivers[kind].receive, order.handle, order.manifest)
        if order.manifest.HasField("lora"):
            received = await self._merge(received, order.manifest)
        self._prefetched = ReceivedVersion(
            order.publication_id, order.manifest.version.version, order.manifest.checksum, received
        )

    @traced("swap weights")
    async def swap(self, order: weightsync_pb2.SwapOrder) -> float:
        """Load the prefetched version; return the pause time, in seconds."""
        ready = self._prefetched
        if ready is None or ready.publication_id != order.publication_id:
            raise ManifestError(f"ordered to serve {manifests.describe(order.version)}, which was not prefetched")
        if self.served is not None:
            self._replaced.append(self.served)
        self.served = None  # what the engine serves is unknown until load_weights returns
        self._prefetched = None
        self._replaced.append(ready)  # until it has been loaded
        pause_s = await self._target.load_weights(ready.version, ready.received.tensors)
        self._replaced.remove(ready)
        self.served = ready
        self._release()  # the engine has no use for older tensors once load_weights has returned
        return pause_s

    async def check(self, manifest: policy_pb2.Manifest) -> None:
        """Compare the served weights with a manifest; raises ChecksumMismatch when they differ."""
        parameters = await self._target.weight_bytes()
        received = None if self.served is None else self.served.received
        if not manifest.HasField("lora"):
            await asyncio.to_thread(check_weight_update_equal, manifest, parameters)
        elif isinstance(received, AdaptedWeights):
            await asyncio.to_thread(self._adapter_base().check, manifest, received, parameters)
        else:
            raise ManifestError(f"the engine serves no adapter, but {manifests.describe(manifest.version)} is one")

    def discard_prefetched(self, publication_id: int) -> bool:
        """Discard the prefetched version if it is this one."""
        if self._prefetched is None or self._prefetched.publication_id != publication_id:
            return False
        self._replaced.append(self._prefetched)
        self._prefetched = None
        return True

    @traced("release weights")
    async def wait_until_released(self, order: weightsync_pb2.DiscardOrder) -> None:
        """Return when the engine holds no tensor of a version any more; ManifestError when it does after a grace."""
        end = time.monotonic() + _RELEASE_GRACE_S
        while order.publication_id in self._release():
            if time.monotonic() > end:
                raise ManifestError(f"the engine still holds tensors of {manifests.describe(order.version)}")
            await asyncio.to_thread(gc.collect)
            await asyncio.sleep(_RELEASE_POLL_S)

    async def close(self) -> None:
        """Close the receivers; the engine keeps what it serves."""
        for receiver in self._receivers.values():
            await asyncio.to_thread(receiver.close)
        self._receivers.clear()

    def _release(self) -> set[int]:
        """Release replaced versions; return the publications of which the engine still holds tensors."""
        self._replaced = [old for old in self._replaced if not old.received.release()]
        return {old.publication_id for old in self._replaced}

    async def _merge(self, adapter: ReceivedWeights, manifest: policy_pb2.Manifest) -> AdaptedWeights:
        """Merge while prefetching and not in the swap, so that generation goes on meanwhile."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(adapter.release)
            merged = await asyncio.to_thread(self._adapter_base().merge, adapter, manifest)
            on_failure.pop_all()
        return merged

    def _adapter_base(self) -> AdapterBase:
        if self._base is None:
            raise WeightsRefused("the version consists of an adapter, and this engine has no base to merge it into")
        return self._base

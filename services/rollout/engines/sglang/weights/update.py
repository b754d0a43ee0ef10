"""One version into one server, inside an update session that always ends."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.server.flags import KEEP_WORKSPACES
from miles.services.rollout.engines.sglang.server.http_api import SglangApi
from miles.services.rollout.engines.sglang.weights import buckets
from miles.services.rollout.engines.sglang.weights.buckets import Bucket
from miles.services.rollout.engines.sglang.weights.checker import Selector

if TYPE_CHECKING:
    from miles.services.rollout.engines.sglang.weights.broadcast_member import ServerMember
    from miles.services.rollout.engines.sglang.weights.remote import RemoteWeights


class WeightUpdate:
    """The update of one server, whose scheduler is paused, to one version.

    No call flushes the cache: SGLang exits when the flush of an update finds requests.
    """

    def __init__(
        self, api: SglangApi, version: int | None, selector: Selector, timeout_s: float, *, repacking_ranks: int = 0
    ) -> None:
        """`version` None leaves the server's version as it is.

        `repacking_ranks`: how many hold experts in another layout than they come in, which is undone in a session.
        """
        self._api = api
        self._repacking_ranks = repacking_ranks
        self._version = None if version is None else str(version)
        self._selector = selector
        self._timeout_s = timeout_s

    async def from_tensors(self, parts: AsyncIterator[tuple[Bucket, bool]], tensor_parallel: int) -> None:
        """Load buckets of shared memory; each comes with whether it is the last. Raises ServerRefused, EngineFailed."""
        async with self._session():
            async for bucket, last in parts:
                await self._api.post(
                    "/update_weights_from_tensor",
                    {
                        "serialized_named_tensors": [bucket.serialized() for _ in range(tensor_parallel)],
                        "load_format": buckets.FORMAT,
                        "flush_cache": False,
                        "weight_version": self._version if last else None,
                        "selector": self._selector,
                    },
                    self._timeout_s,
                )

    async def from_sources(self, member: ServerMember, weights: RemoteWeights) -> None:
        """Have the server receive the trainer's broadcasts. Raises like `ServerMember.receive`."""
        async with self._session():
            await member.receive(weights, self._version, self._selector)

    async def from_files(self, folder: pathlib.Path) -> None:
        """Load a folder of safetensors files. Raises ServerRefused, EngineFailed."""
        body = {"model_path": str(folder), "load_format": "auto", "flush_cache": False}
        async with self._session() if self._repacking_ranks else contextlib.nullcontext():
            path = "/update_weights_from_disk"
            await self._api.post(path, {**body, "weight_version": self._version}, self._timeout_s)

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[None]:
        await self._begin()
        try:
            if self._repacking_ranks:
                await self._keep_workspaces()
            yield
        except EngineFailed:
            raise  # the server is gone or hangs; it would not answer
        except BaseException:
            await self._api.post("/end_weight_update", {}, self._timeout_s)
            raise
        await self._api.post("/end_weight_update", {}, self._timeout_s)

    async def _keep_workspaces(self) -> None:
        """Have the server keep what its graphs use apart from weights; see `in_server.miles_marlin_workspaces`."""
        body = {
            "serialized_named_tensors": [buckets.serialized([])] * self._repacking_ranks,
            "load_format": KEEP_WORKSPACES,
            "flush_cache": False,
            "selector": self._selector,
        }
        await self._api.post("/update_weights_from_tensor", body, self._timeout_s)

    async def _begin(self) -> None:
        body = {"selector": self._selector}
        try:
            await self._api.post("/begin_weight_update", body, self._timeout_s)
        except ServerRefused as error:
            if "already open" not in str(error):
                raise
            # An earlier update lost its connection before it could end its session.
            await self._api.post("/end_weight_update", {}, self._timeout_s)
            await self._api.post("/begin_weight_update", body, self._timeout_s)

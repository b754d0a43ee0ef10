"""One version into one server, inside an update session that always ends."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.server.flags import DRAIN, KEEP_WORKSPACES
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
        self,
        api: SglangApi,
        version: int | None,
        selector: Selector,
        timeout_s: float,
        *,
        ranks: int = 1,
        repacks: bool = False,
        drains: bool = False,
    ) -> None:
        """`version` None leaves the server's version as it is.

        Args:
            ranks: The server's tensor-parallel size.
            repacks: Whether it holds experts in another layout than they come in, which it undoes in a session alone.
            drains: Whether its GPU finishes all its work first and last, because nothing else waits for it.

        A server that repacks or drains must have the functions of `in_server`.
        """
        self._api = api
        self._ranks = ranks
        self._repacks = repacks
        self._drains = drains
        self._version = None if version is None else str(version)
        self._selector = selector
        self._timeout_s = timeout_s

    async def from_tensors(self, parts: AsyncIterator[tuple[Bucket, bool]]) -> None:
        """Load buckets, each with whether it is the last, which the server maps. Raises ServerRefused, EngineFailed."""
        async with self._session():
            async for bucket, last in parts:
                await self._api.post(
                    "/update_weights_from_tensor",
                    {
                        "serialized_named_tensors": [bucket.serialized() for _ in range(self._ranks)],
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

    async def drain(self) -> None:
        """Return once the GPU of a server that has the functions of `in_server` has finished all its work.

        The end of a session processes the weights of the models that it was begun for, as if they were new ones. So
        this one is begun for the draft model, which few servers have and no update of the policy changes, and the
        function is called for the policy's.
        """
        async with self._session():
            await self._call(DRAIN, "target")

    async def from_files(self, folder: pathlib.Path) -> None:
        """Load a folder of safetensors files. Raises ServerRefused, EngineFailed."""
        body = {"model_path": str(folder), "load_format": "auto", "flush_cache": False}
        async with self._session() if self._repacks else contextlib.nullcontext():
            path = "/update_weights_from_disk"
            await self._api.post(path, {**body, "weight_version": self._version}, self._timeout_s)

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[None]:
        await self._begin()
        try:
            if self._repacks:
                await self._call(KEEP_WORKSPACES)
            if self._drains:
                await self._call(DRAIN)
            yield
            if self._drains:
                await self._call(DRAIN)
        except EngineFailed:
            raise  # the server is gone or hangs; it would not answer
        except BaseException:
            await self._api.post("/end_weight_update", {}, self._timeout_s)
            raise
        await self._api.post("/end_weight_update", {}, self._timeout_s)

    async def _call(self, function: str, selector: Selector | None = None) -> None:
        """Have every rank call a function of `in_server`, for a model that may be another than the session's."""
        body = {
            "serialized_named_tensors": [buckets.serialized([])] * self._ranks,
            "load_format": function,
            "flush_cache": False,
            "selector": self._selector if selector is None else selector,
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

"""New weights into one server, inside an update session that always ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Literal

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.server.http_api import SglangApi
from miles.services.rollout.engines.sglang.weights import buckets
from miles.services.rollout.engines.sglang.weights.buckets import Bucket, NamedTensor

if TYPE_CHECKING:
    from miles.services.rollout.engines.sglang.weights.broadcast_member import ServerMember
    from miles.services.rollout.engines.sglang.weights.remote import RemoteWeights

Selector = Literal["target", "draft", "all"]
"""Whose weights: the policy's, the draft model's, or of both where one checkpoint holds them."""
NOTHING = ""
"""A part of every tensor's name: leaves all of them out of a check."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checksum:
    """Of a server's weights."""

    value: str
    """The same for servers of the same parallel sizes that hold the same bytes."""
    names: frozenset[str]
    """Of the parameters, as the server calls them."""


class WeightUpdate:
    """One version on its way into one server, whose scheduler is paused.

    No call flushes the cache: SGLang ends itself when a flush of an update finds requests.
    """

    def __init__(self, api: SglangApi, version: int | None, selector: Selector, timeout_s: float) -> None:
        """`version` None leaves the server's version as it is."""
        self._api = api
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
        """Have the server take the trainer's broadcasts. Raises like `ServerMember.receive`."""
        async with self._session():
            await member.receive(weights, self._version, self._selector)

    async def from_files(self, folder: pathlib.Path) -> None:
        """Load a folder of safetensors files. Raises ServerRefused, EngineFailed."""
        body = {"model_path": str(folder), "load_format": "auto", "flush_cache": False}
        await self._api.post("/update_weights_from_disk", {**body, "weight_version": self._version}, self._timeout_s)

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[None]:
        await self._begin()
        try:
            yield
        except EngineFailed:
            raise  # the server is gone or hangs; nothing else reaches it
        except BaseException:
            await self._api.post("/end_weight_update", {}, self._timeout_s)
            raise
        await self._api.post("/end_weight_update", {}, self._timeout_s)

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


async def drain_device(api: SglangApi, timeout_s: float) -> None:
    """Return once a server's GPU has done all that was asked of it.

    The scheduler synchronises its device for a checksum, here one of no tensors. After a pause in place this waits for
    the step under way, after an update for the copies out of buffers that are to be freed.
    """
    await api.post("/weights_checker", {"action": "checksum", "skip_tensor_list": [NOTHING]}, timeout_s)


async def checksum(api: SglangApi, selector: Selector, timeout_s: float) -> Checksum:
    """Of everything a server holds. A server answers for a draft model that it does not have, too: without names."""
    answer = await api.post("/weights_checker", {"action": "checksum", "selector": selector}, timeout_s)
    names = frozenset(name for rank in answer.get("ranks") or () for name in rank["checksums"])
    return Checksum(str(answer.get("per_engine_checksum") or ""), names)


async def write_files(folder: pathlib.Path, parts: Sequence[Sequence[NamedTensor]]) -> None:
    """Write each bucket as one safetensors file of a new folder."""
    await asyncio.to_thread(_write_files, folder, parts)


def _write_files(folder: pathlib.Path, parts: Sequence[Sequence[NamedTensor]]) -> None:
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, part in enumerate(parts):
        # Clones: parts of one fused tensor share their memory, which the format does not know.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in part}
        save_file(tensors, folder / f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors")

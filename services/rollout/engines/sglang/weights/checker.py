"""SGLang's weights checker: checksums of what a server holds, overwriting it with noise, and waiting for its GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from miles.services.rollout.engines.sglang.server.http_api import SglangApi

Selector = Literal["target", "draft", "all"]
"""Whose weights: the policy's, the draft model's, or both where one checkpoint holds them."""
NOTHING = ""
"""A part of every tensor's name: leaves all of them out of a check."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checksum:
    """The checksum of a server's weights."""

    value: str
    """The same for servers of the same parallel sizes that hold the same bytes."""
    names: frozenset[str]
    """Of the parameters, as the server calls them."""


def held_format(names: Iterable[str]) -> str | None:
    """The format of a server's weights, by the names of its parameters; None when they are not quantised."""
    found = list(names)
    if any(name.endswith("weight_scale_inv") for name in found):
        return "fp8_block"
    return "int4" if any(name.endswith("weight_packed") for name in found) else None


async def checksum(api: SglangApi, selector: Selector, timeout_s: float) -> Checksum:
    """Checksum everything that a server holds. For a draft model that it does not have the answer has no names."""
    answer = await api.post("/weights_checker", {"action": "checksum", "selector": selector}, timeout_s)
    names = frozenset(name for rank in answer.get("ranks") or () for name in rank["checksums"])
    return Checksum(str(answer.get("per_engine_checksum") or ""), names)


async def overwrite_with_noise(api: SglangApi, selector: Selector, timeout_s: float) -> None:
    """Overwrite everything that a server holds, so that only what is loaded afterwards can match a checksum."""
    await api.post("/weights_checker", {"action": "reset_tensors", "selector": selector}, timeout_s)


async def drain_device(api: SglangApi, timeout_s: float) -> None:
    """Return once a server's GPU has finished all its work.

    The scheduler synchronises its device for a checksum, here one of no tensors. After a pause in place this waits for
    the running step, after an update for the copies out of buffers that are about to be freed.
    """
    await api.post("/weights_checker", {"action": "checksum", "skip_tensor_list": [NOTHING]}, timeout_s)

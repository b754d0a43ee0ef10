"""The choice of transports, from what trainer and engines can use. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from miles.rpc.gen import weightsync_pb2
from miles.rpc.gen.weightsync_pb2 import (
    TRANSPORT_KIND_CUDA_IPC,
    TRANSPORT_KIND_DISK_DELTA,
    TRANSPORT_KIND_GRPC_CHUNKS,
    TRANSPORT_KIND_SHARED_MEMORY,
    TRANSPORT_KIND_UNSPECIFIED,
)

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2 import TransportKind

PREFERENCE = (TRANSPORT_KIND_SHARED_MEMORY, TRANSPORT_KIND_DISK_DELTA, TRANSPORT_KIND_GRPC_CHUNKS)
"""What each engine gets the first of that it can use: no copy, then changes only, then what works anywhere.

Before these comes CUDA_IPC, where all engines can use it.
"""

IN_MEMORY = (TRANSPORT_KIND_SHARED_MEMORY, TRANSPORT_KIND_GRPC_CHUNKS)
"""Both reach bytes in the service's shared memory."""


class NoTransport(ValueError):
    """The trainer cannot use what was asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """How the trainer sends a version."""

    kinds: tuple[TransportKind.ValueType, ...]
    """Transports to send by; at least one."""
    fixed: bool
    """Whether engines must use that one, too."""

    @property
    def in_memory(self) -> bool:
        """Whether the bytes lie in the service's shared memory."""
        return any(kind in IN_MEMORY for kind in self.kinds)


def place(
    asked_for: TransportKind.ValueType,
    trainer: Collection[int],
    engines: Iterable[Collection[int]],
    *,
    folders: bool,
) -> Placement:
    """Choose for one version from what the trainer and each attached engine can use; `folders`: storage is shared.

    An engine has CUDA_IPC among its transports when the trainer can share GPU memory with it. When all have it, and
    there is one, the version goes to GPU memory; it never goes there beside another place, because the two have
    different checksums.

    Bytes in the service's memory can be mapped on its own host and sent to all others in chunks, so a version is put
    there unless every engine reads folders. Raises NoTransport when the trainer cannot send by what was asked for.
    """
    if asked_for == TRANSPORT_KIND_DISK_DELTA and not folders:
        raise NoTransport("DISK_DELTA needs a folder that all share; start the weightsync service with --disk-dir")
    if asked_for != TRANSPORT_KIND_UNSPECIFIED:
        if asked_for in PREFERENCE and asked_for not in trainer:
            raise NoTransport(f"the trainer cannot use {_name(asked_for)}, only {_names(trainer)}")
        return Placement((asked_for,), fixed=True)
    attached = list(engines)
    if attached and all(TRANSPORT_KIND_CUDA_IPC in usable for usable in attached):
        return Placement((TRANSPORT_KIND_CUDA_IPC,), fixed=False)
    by_folder = folders and TRANSPORT_KIND_DISK_DELTA in trainer
    offered = [kind for kind in PREFERENCE if by_folder or kind != TRANSPORT_KIND_DISK_DELTA]
    chosen = {next((kind for kind in offered if kind in usable), TRANSPORT_KIND_GRPC_CHUNKS) for usable in attached}
    mapped = TRANSPORT_KIND_SHARED_MEMORY in trainer
    kinds: list[TransportKind.ValueType] = []
    if chosen & set(IN_MEMORY) or (not chosen and (mapped or not by_folder)):
        kinds.append(TRANSPORT_KIND_SHARED_MEMORY if mapped else TRANSPORT_KIND_GRPC_CHUNKS)
    if TRANSPORT_KIND_DISK_DELTA in chosen or not kinds:
        kinds.append(TRANSPORT_KIND_DISK_DELTA)
    if not set(kinds) <= set(trainer):
        raise NoTransport(f"the trainer can use {_names(trainer)} only; {_names(kinds)} is needed")
    return Placement(tuple(kinds), fixed=False)


def transports_of(placement: Placement) -> list[TransportKind.ValueType]:
    """The transports by which engines can get a version, the best first."""
    if placement.fixed or TRANSPORT_KIND_CUDA_IPC in placement.kinds:
        return list(placement.kinds)
    found = set(placement.kinds) | (set(IN_MEMORY) if placement.in_memory else set())
    return [kind for kind in PREFERENCE if kind in found]


def transport_for(placement: Placement, usable: Collection[int]) -> TransportKind.ValueType:
    """The transport by which an engine gets a version. When it can use none: the best, which then fails."""
    offered: Sequence[TransportKind.ValueType] = transports_of(placement)
    return next((kind for kind in offered if kind in usable), offered[0])


def names(kinds: Iterable[int]) -> str:
    """Names of transports as the configuration has them, for the log."""
    return " and ".join(_name(kind).lower() for kind in kinds)


def _name(kind: int) -> str:
    return weightsync_pb2.TransportKind.Name(kind).removeprefix("TRANSPORT_KIND_")  # type: ignore[arg-type]


def _names(kinds: Iterable[int]) -> str:
    return ", ".join(_name(kind) for kind in sorted(kinds)) or "none"

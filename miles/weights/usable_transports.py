"""Finds out which transports a process can use. Needs no torch."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from miles.rpc.gen import weightsync_pb2

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2 import TransportKind

GPU_MEMORY_PARTS = 32
"""A version is put into GPU memory when it takes at most this part of it, 1/32.

Trainer and engine keep up to two copies each, all of them on one GPU when that is shared: together an eighth. A GPU
that is filled by a large model has no such room to spare, and what the copies through the host cost is little there
beside the training step.
"""


def usable_transports(described: weightsync_pb2.DescribeTransportsResponse) -> list[TransportKind.ValueType]:
    """The transports whose files this process shares with the service, and those that need no files.

    A path alone proves nothing: containers on one host may have different folders of the same name.
    """
    found = [probe.kind for probe in described.probes if _sees(probe)]
    return [*found, weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS]


def fits_gpu_memory(nbytes: int, gpu_nbytes: int) -> bool:
    """Whether a version of `nbytes` bytes is small beside the memory of a GPU."""
    return nbytes * GPU_MEMORY_PARTS <= gpu_nbytes


def _sees(probe: weightsync_pb2.TransportProbe) -> bool:
    try:
        return bool(probe.token) and pathlib.Path(probe.path).read_text() == probe.token
    except (OSError, UnicodeDecodeError):
        return False

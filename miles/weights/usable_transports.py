"""Finds out which transports a process can use. Needs no torch."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from miles.rpc.gen import weightsync_pb2

if TYPE_CHECKING:
    from miles.rpc.gen import weightsource_pb2
    from miles.rpc.gen.weightsync_pb2 import TransportKind

_COPIES = 2
"""Copies of a version that trainer and engines keep at most, each of them."""

_GPU_MEMORY_PARTS = 8
"""Versions are put into GPU memory when all copies together take at most this part of it, an eighth.

A GPU that is filled by a large model has no such room to spare, and what the copies through the host cost is little
there beside the training step.
"""


def usable_transports(described: weightsync_pb2.DescribeTransportsResponse) -> list[TransportKind.ValueType]:
    """The transports whose files this process shares with the service, and those that need no files.

    A path alone proves nothing: containers on one host may have different folders of the same name.
    """
    found = [probe.kind for probe in described.probes if _sees(probe)]
    return [*found, weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS]


def fits_gpu_memory(nbytes: int, gpu_nbytes: int, engines: int = 1) -> bool:
    """Whether a version of `nbytes` bytes is small beside a GPU that the trainer and so many engines share.

    For one engine that is 1/32 of the memory, for four 1/80.
    """
    return nbytes * _COPIES * (1 + engines) * _GPU_MEMORY_PARTS <= gpu_nbytes


def engines_by_gpu(probes: Iterable[weightsource_pb2.GpuMemoryProbe]) -> Counter[str]:
    """How many engines share memory of each GPU, by the GPU's UUID."""
    return Counter(probe.memory.device_uuid for probe in probes)


def _sees(probe: weightsync_pb2.TransportProbe) -> bool:
    try:
        return bool(probe.token) and pathlib.Path(probe.path).read_text() == probe.token
    except (OSError, UnicodeDecodeError):
        return False

"""Finds out which transports a process can use. Needs no torch."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from miles.rpc.gen import weightsync_pb2

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2 import TransportKind


def usable_transports(described: weightsync_pb2.DescribeTransportsResponse) -> list[TransportKind.ValueType]:
    """The transports whose files this process shares with the service, and those that need no files.

    A path alone proves nothing: containers on one host may have different folders of the same name.
    """
    found = [probe.kind for probe in described.probes if _sees(probe)]
    return [*found, weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS]


def _sees(probe: weightsync_pb2.TransportProbe) -> bool:
    try:
        return bool(probe.token) and pathlib.Path(probe.path).read_text() == probe.token
    except (OSError, UnicodeDecodeError):
        return False

"""An engine that misbehaves in the middle of a broadcast, after a few buckets, as it is told to."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import time

import torch
from broadcast_kit import QUICK, read

from miles.rpc.gen import weightsource_pb2
from miles.weights.transports.collective.group import Group, Watch
from miles.weights.transports.collective.member import receive_from

_AFTER_BUCKETS = 2


class Ending:
    """Takes the first buckets only."""

    def __init__(self, sizes: list[int], ending: signal.Signals, victim: int, device: torch.device) -> None:
        self._device = device
        self._sizes = sizes
        self._ending = ending
        self._victim = victim

    def join(self, source: str, ticket: weightsource_pb2.GroupTicket, watch: Watch) -> None:
        self._group = Group(ticket, ticket.rank_offset, self._device, watch, QUICK.patience_s)

    def take(self, source: str, watch: Watch) -> None:
        for index, size in enumerate(self._sizes):
            if index == _AFTER_BUCKETS:
                print("in the middle", flush=True)
                os.kill(self._victim or os.getpid(), self._ending)
            flat = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._group.wait(self._group.broadcast(flat, watch), watch, "a bucket")

    def leave(self, source: str) -> None:
        self._group.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--ending", default="SIGKILL")
    parser.add_argument("--victim", type=int, default=0, help="process to end; 0 for this one")
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args()
    handle, _ = read(options.folder)
    source = handle.collective.buckets[0].source
    sizes = [bucket.nbytes for bucket in handle.collective.buckets if bucket.source == source]
    receiver = Ending(sizes, signal.Signals[options.ending], options.victim, options.device)
    try:
        hello = weightsource_pb2.JoinHello(publication_id=handle.publication_id, member="ending", ranks=1)
        receive_from(source, hello, receiver, time.monotonic() + 30, QUICK)
    except (ConnectionError, TimeoutError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)

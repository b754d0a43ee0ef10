"""A process that holds weights as an engine does; tests start it, read what it says and kill it.

Prints one JSON object per line whenever its subscription changes state, and on stdin answers `digest` with the xxh3-128
of every tensor it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping

import torch

from miles.rpc.gen import policy_pb2
from miles.services.rollout.engines.checkpoint_weights import read_weights
from miles.weights import SubscriberState, WeightSubscriber
from miles.weights.adapters.merging import AdapterBase
from miles.weights.manifest import checksum


class HoldingEngine:
    """Keeps the tensors it is given, as an engine without a device of its own would."""

    def __init__(self, fail_at: int, hang_at: int, corrupt_at: int, copy: bool, keep: bool) -> None:
        self._fail_at = fail_at
        self._hang_at = hang_at
        self._corrupt_at = corrupt_at
        self._copy = copy
        self._keep = keep
        self.first: dict[str, torch.Tensor] = {}
        self._version: int | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    @property
    def version(self) -> int | None:
        return self._version

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        if version == self._fail_at:
            self._fail_at = -1
            raise RuntimeError("out of memory while swapping")
        if version == self._hang_at:
            self._hang_at = -1
            await asyncio.sleep(3600)
        self._tensors = {name: tensor.clone() if self._copy else tensor for name, tensor in tensors.items()}
        if self._keep and not self.first:
            self.first = self._tensors
        if version == self._corrupt_at:
            self._corrupt_at = -1
            first = next(iter(self._tensors.values()))
            first.view(-1).view(torch.uint8)[0] ^= 1
        self._version = version
        return 0.001

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        return self._tensors

    def digest(self, first: bool = False) -> dict[str, str]:
        """xxh3-128 of each tensor's bytes, in hex, by name: of those served, or of those loaded first."""
        return {
            name: checksum(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hex()
            for name, tensor in (self.first if first else self._tensors).items()
        }


async def run(arguments: argparse.Namespace) -> None:
    """Follow the service until stdin ends."""
    engine = HoldingEngine(
        arguments.fail_at, arguments.hang_at, arguments.corrupt_at, arguments.copy, arguments.keep_first
    )

    def say(state: SubscriberState) -> None:
        report = {"state": state.value, "version": subscriber.version, "error": subscriber.last_error}
        print(json.dumps(report), flush=True)

    stream = policy_pb2.WeightStream.Value(f"WEIGHT_STREAM_{arguments.stream.upper()}")
    base = None if arguments.base is None else AdapterBase(read_weights(*arguments.base), engine.device)
    subscriber = WeightSubscriber(arguments.address, arguments.job, arguments.engine_id, stream, engine, say, base=base)
    await subscriber.start()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        what = line.strip().decode()
        print(json.dumps({what: engine.digest(first=what == "first")}), flush=True)
    await subscriber.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--engine-id", required=True)
    parser.add_argument("--stream", default="policy")
    parser.add_argument("--fail-at", type=int, default=-1)
    parser.add_argument("--hang-at", type=int, default=-1)
    parser.add_argument("--corrupt-at", type=int, default=-1)
    parser.add_argument("--copy", action="store_true")
    parser.add_argument("--keep-first", action="store_true")
    parser.add_argument("--base", nargs=2, metavar=("DIR", "DTYPE"), help="what adapters are merged into")
    asyncio.run(run(parser.parse_args()))

"""Commands that rank 0 broadcasts to the other ranks over gloo: JSON, with bytes beside it.

Rank 0 answers gRPC; every other rank runs `follow`. All ranks run the same command and then call `Ranks.agree`, so that
a failure on one rank is known to all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from miles.threads import only_exceptions

logger = logging.getLogger(__name__)

SILENCE_LIMIT = datetime.timedelta(minutes=30)
"""How long a rank waits for the others; rank 0 sends `HEARTBEAT` more often than that."""

HEARTBEAT = "heartbeat"
EXIT = "exit"
_DONE, _FAILED = b"+", b"-"


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """What every rank is to run."""

    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """JSON values."""
    payloads: tuple[bytes, ...] = ()


class RankFailedError(RuntimeError):
    """A command failed on a rank other than this one; the message says which and why."""


class RanksLostError(RuntimeError):
    """The ranks are not connected any more, so that nothing can be run on all of them."""


class Ranks:
    """This process's rank among those that train together, and its connection to them."""

    def __init__(self) -> None:
        """Needs the default process group; collective over its ranks."""
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=SILENCE_LIMIT) if self.count > 1 else None

    def send(self, command: Command) -> None:
        """Rank 0: have the other ranks run the command."""
        if self._group is None:
            return
        header = {"name": command.name, "arguments": command.arguments, "sizes": [len(p) for p in command.payloads]}
        self._broadcast(json.dumps(header).encode())
        if command.payloads:
            self._broadcast(b"".join(command.payloads))

    def receive(self) -> Command:
        """Other ranks: wait for a command. Raises RanksLostError when rank 0 is gone or silent for too long."""
        header = json.loads(self._broadcast(b""))
        payloads = []
        if header["sizes"]:
            data, start = self._broadcast(b""), 0
            for size in header["sizes"]:
                payloads.append(data[start : start + size])
                start += size
        return Command(header["name"], header["arguments"], tuple(payloads))

    def agree(self, error: BaseException | None, report: bytes = b"") -> list[bytes]:
        """Share this rank's outcome of a command; returns every rank's report.

        Raises this rank's own error, RankFailedError for that of another, or RanksLostError.
        """
        reports = [report]
        if self._group is not None:
            mine = _DONE + report if error is None else _FAILED + f"{type(error).__name__}: {error}".encode()
            outcomes = self._gather(mine)
            failed = {rank: text[1:].decode() for rank, text in enumerate(outcomes) if text[:1] == _FAILED}
            if failed and error is None:
                raise RankFailedError("; ".join(f"rank {rank} failed: {text}" for rank, text in failed.items()))
            reports = [outcome[1:] for outcome in outcomes]
        if error is not None:
            raise error
        return reports

    def share(self, flag: bool) -> bool:
        """Broadcast rank 0's flag to every rank."""
        if self._group is None:
            return flag
        shared = torch.tensor([flag])
        with _connected():
            dist.broadcast(shared, src=0, group=self._group)
        return bool(shared)

    def _broadcast(self, data: bytes) -> bytes:
        with _connected():
            return self._broadcast_bytes(data)

    def _broadcast_bytes(self, data: bytes) -> bytes:
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0, group=self._group)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, src=0, group=self._group)
        return data if self.rank == 0 else buffer.numpy().tobytes()

    def _gather(self, data: bytes) -> list[bytes]:
        with _connected():
            return self._gather_bytes(data)

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
        longest = max(1, *(int(size) for size in sizes))
        mine = torch.zeros(longest, dtype=torch.uint8)
        if data:
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        buffers = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(buffers, mine, group=self._group)
        return [b.numpy().tobytes()[: int(size)] for b, size in zip(buffers, sizes, strict=True)]


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Raise RanksLostError for what a collective raises."""
    try:
        yield
    except RuntimeError as error:
        raise RanksLostError(f"the connection to the other ranks broke: {error}") from error


def follow(ranks: Ranks, run: Callable[[Command], object]) -> None:
    """Ranks other than 0: run commands until `EXIT`, and report the bytes that `run` returns.

    A failed command is logged; rank 0 decides what to do about it.
    """
    while True:
        command = ranks.receive()
        if command.name == EXIT:
            return
        if command.name == HEARTBEAT:
            continue
        error: Exception | None = None
        result: object = None
        try:
            with only_exceptions():
                result = run(command)
        except Exception as caught:
            logger.exception("rank %d: %s failed", ranks.rank, command.name)
            error = caught
        try:
            ranks.agree(error, result if isinstance(result, bytes) else b"")
        except Exception as failure:
            logger.error("rank %d: %s: %s", ranks.rank, command.name, failure)

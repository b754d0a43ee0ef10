"""A process group of one source and the engines that it broadcasts to, separate from other groups of the process.

The store's keys are those of a group that `torch.distributed` makes under the same name, prefixed once more with the
name, so the other members may be servers that join by `/init_weights_update_group`, as SGLang's do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from miles.rpc.gen import weightsource_pb2

T = TypeVar("T")
_FIRST_POLL_S, _LAST_POLL_S = 0.0002, 0.01
_STORE_DEVICE = {"gloo": "cpu", "nccl": "cuda"}
"""The device name in torch's store keys, by backend."""

_NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "100",
}
"""Read when a group is made. Without them torch's watchdog ends the process when a peer is lost, the trainer's too."""

_environment_lock = threading.Lock()

Store = Any
"""torch.distributed.TCPStore, which has no type that mypy sees."""


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Times in seconds."""

    gather_s: float = 0.25
    """How long to wait, after the first engine that asks for a version, for others that want the same."""
    linger_s: float = 2.0
    """The same when engines that received the previous version are missing: one broadcast to all costs less."""
    connect_s: float = 5.0
    """How long a receiver tries to connect to a source."""
    patience_s: float = 30.0
    """How long one bucket, or making a group, may take."""
    deadline_s: float = 120.0
    """How long a broadcast may take, and how long a receiver may take to get every bucket."""


class BroadcastFailed(ConnectionError):
    """A member is gone or too slow; the others may form another group."""


class Watch:
    """A deadline for waits that can be ended early: one thread waits, others may `stop` it."""

    def __init__(self, deadline_s: float) -> None:
        """`deadline_s` is on the monotonic clock."""
        self.deadline_s = deadline_s
        self.reason = ""

    def stop(self, reason: str) -> None:
        """End every wait now; the first reason counts."""
        self.reason = self.reason or reason

    def until(
        self, done: Callable[[], object], what: str | Callable[[], str], patience_s: float = float("inf")
    ) -> None:
        """Wait until `done`; raises BroadcastFailed when stopped, TimeoutError past the deadline or patience_s.

        `what` is waited for, for the message.
        """
        began = time.monotonic()
        pause_s = _FIRST_POLL_S
        while not done():
            if self.reason:
                raise BroadcastFailed(self.reason)
            now = time.monotonic()
            if now >= self.deadline_s or now - began > patience_s:
                raise TimeoutError(f"waited {now - began:.1f} s for {what if isinstance(what, str) else what()}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)


class Group:
    """This process's part of a group. The constructor returns when every member has joined."""

    def __init__(
        self,
        ticket: weightsource_pb2.GroupTicket,
        rank: int,
        device: torch.device,
        watch: Watch,
        patience_s: float,
        store: Store = None,
    ) -> None:
        """`store` is the source's own; members connect to it by the ticket. Each step may take `patience_s` seconds."""
        self.name = ticket.group_name
        self._device = device
        self._patience_s = patience_s
        self._store = store
        """Kept alive because the other members use it."""
        self._connected = ticket.backend == "gloo"
        what = f"the {ticket.world_size} ranks of group {self.name}"
        self._group: Any = self._apart(lambda: _process_group(ticket, rank, device, patience_s, store), watch, what)

    def broadcast(self, flat: torch.Tensor, watch: Watch) -> dist.Work:
        """Begin to send (rank 0) or receive bytes, uint8 (n,), after the work queued on the current stream."""

        def begin() -> dist.Work:
            options = dist.BroadcastOptions()
            options.rootRank = 0
            options.rootTensor = 0
            work: dist.Work = self._group.broadcast([flat], options)
            return work

        if not self._connected:  # NCCL connects now, and waits for every member
            work = self._apart(begin, watch, f"the members of group {self.name} to connect")
            self._connected = True
            return work
        with _torch_failures(f"group {self.name}"):
            return begin()

    def wait(self, work: dist.Work, watch: Watch, what: str) -> None:
        """Return when a broadcast has ended here; raises BroadcastFailed or TimeoutError."""
        watch.until(work.is_completed, what, self._patience_s)
        # After a fault of NCCL, waiting would have the stream wait for a kernel that may never end.
        fault = work.exception() if self._device.type == "cuda" else None
        if fault is not None:
            raise BroadcastFailed(f"{what}: {fault}")
        with _torch_failures(what):
            work.wait()

    def close(self) -> None:
        """Leave the group without waiting; broadcasts under way fail for every member."""
        group, self._group = self._group, None

        def leave(group: Any) -> None:
            with contextlib.suppress(RuntimeError):  # a group that is broken already
                group.abort()

        if group is not None:
            threading.Thread(target=leave, args=(group,), name=f"leave {self.name}", daemon=True).start()

    def _apart(self, call: Callable[[], T], watch: Watch, what: str) -> T:
        """Run an uninterruptible call of torch in a thread; when a peer is lost, leave it to its own deadline."""
        results: list[T] = []
        errors: list[BaseException] = []
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

        def run() -> None:
            try:
                with torch.cuda.stream(stream):
                    results.append(call())
            except BaseException as error:  # what torch raises when a peer does not come, or anything else
                errors.append(error)

        threading.Thread(target=run, name=f"join {self.name}", daemon=True).start()
        watch.until(lambda: results or errors, what, self._patience_s)
        if errors:
            raise BroadcastFailed(f"{what}: {errors[0]}") from errors[0]
        return results[0]


def open_store(host: str, timeout_s: float) -> Store:
    """Open a store in this process for one group; its `port` is the free one that it took."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return _torch("TCPStore")(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)


def _process_group(
    ticket: weightsource_pb2.GroupTicket, rank: int, device: torch.device, patience_s: float, store: Store
) -> Any:
    timeout = datetime.timedelta(seconds=patience_s)
    if ticket.backend not in _STORE_DEVICE:
        raise ValueError(f"backend {ticket.backend!r} is not one of {', '.join(_STORE_DEVICE)}")
    keys = store or _torch("TCPStore")(ticket.master_address, ticket.master_port, is_master=False, timeout=timeout)
    for prefix in (ticket.group_name, f"{ticket.group_name}/", f"{_STORE_DEVICE[ticket.backend]}/"):
        keys = _torch("PrefixStore")(prefix, keys)
    if ticket.backend == "gloo":
        return _torch("ProcessGroupGloo")(keys, rank, ticket.world_size, timeout)
    torch.cuda.set_device(device)
    group_class = _torch("ProcessGroupNCCL")
    options = group_class.Options()
    options._timeout = datetime.timedelta(days=1)  # deadlines are kept here, by `wait` and `close`
    with _environment(_NCCL_ENVIRONMENT):
        return group_class(keys, rank, ticket.world_size, options)


@contextlib.contextmanager
def _torch_failures(what: str) -> Iterator[None]:
    """Turn what torch raises when a peer is lost into BroadcastFailed."""
    try:
        yield
    except RuntimeError as error:
        raise BroadcastFailed(f"{what}: {error}") from error


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables temporarily."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _torch(name: str) -> Any:
    """A class of torch.distributed that has no type that mypy sees, or that some builds lack."""
    found = getattr(dist, name, None)
    if found is None:
        raise ValueError(f"this build of torch has no {name}")
    return found

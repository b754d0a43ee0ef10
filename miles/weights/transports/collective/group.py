"""A process group of one source and the engines that it broadcasts to, apart from any other group of the process.

The store's keys are those of a group that `torch.distributed` makes under the same name, wrapped once more in the name:
so the other members may be servers that join by `/init_weights_update_group`, as SGLang's do.
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
"""The device under which torch files a backend's keys."""

_NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "100",
}
"""Read when a group is made. Otherwise torch's watchdog ends the process, the trainer's too, when a peer is lost."""

_environment_lock = threading.Lock()

Store = Any
"""torch.distributed.TCPStore, which has no type that mypy sees."""


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Times in seconds."""

    gather_s: float = 0.25
    """How long engines that ask for the same version are waited for after the first."""
    linger_s: float = 2.0
    """The same for engines that got the version before, as one broadcast to all is less than one to each."""
    connect_s: float = 5.0
    """How long a receiver tries to reach a source."""
    patience_s: float = 30.0
    """How long a bucket, or the making of a group, may take."""
    deadline_s: float = 120.0
    """How long a broadcast may take, and a receiver until it has every bucket."""


class BroadcastFailed(ConnectionError):
    """A member is gone or too late; whoever is left may form another group."""


class Watch:
    """How long to wait, and whether it has become pointless. One thread waits, others may `stop` it."""

    def __init__(self, deadline_s: float) -> None:
        """`deadline_s` is on the monotonic clock."""
        self.deadline_s = deadline_s
        self.reason = ""

    def stop(self, reason: str) -> None:
        """End every wait now; the first reason counts."""
        self.reason = self.reason or reason

    def until(self, done: Callable[[], object], what: str, patience_s: float = float("inf")) -> None:
        """Wait until `done`; raises BroadcastFailed when stopped, TimeoutError past the deadline or patience_s."""
        began = time.monotonic()
        pause_s = _FIRST_POLL_S
        while not done():
            if self.reason:
                raise BroadcastFailed(self.reason)
            now = time.monotonic()
            if now >= self.deadline_s or now - began > patience_s:
                raise TimeoutError(f"waited {now - began:.1f} s for {what}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)


class Group:
    """This process's part of a group. The constructor returns when every member is there."""

    def __init__(
        self,
        ticket: weightsource_pb2.GroupTicket,
        rank: int,
        device: torch.device,
        watch: Watch,
        patience_s: float,
        store: Store = None,
    ) -> None:
        """`store` is the source's own, which members reach by the ticket; each step may take `patience_s` seconds."""
        self.name = ticket.group_name
        self._device = device
        self._patience_s = patience_s
        self._store = store
        """Kept: it serves the others' stores."""
        self._connected = ticket.backend == "gloo"
        what = f"the {ticket.world_size} ranks of group {self.name}"
        self._group: Any = self._apart(lambda: _process_group(ticket, rank, device, patience_s, store), watch, what)

    def broadcast(self, flat: torch.Tensor, watch: Watch) -> dist.Work:
        """Begin to send (rank 0) or receive bytes, uint8 (n,), after what the current stream does now."""

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
        try:
            return begin()
        except RuntimeError as error:
            raise BroadcastFailed(f"group {self.name}: {error}") from error

    def wait(self, work: dist.Work, watch: Watch, what: str) -> None:
        """Return when a broadcast has ended here; raises BroadcastFailed or TimeoutError."""
        watch.until(work.is_completed, what, self._patience_s)
        # After a fault of NCCL, waiting would have the stream wait for a kernel that may never end.
        fault = work.exception() if self._device.type == "cuda" else None
        if fault is not None:
            raise BroadcastFailed(f"{what}: {fault}")
        try:
            work.wait()
        except RuntimeError as error:
            raise BroadcastFailed(f"{what}: {error}") from error

    def close(self) -> None:
        """Leave the group; what is under way fails, here and at the others. Does not wait."""
        group, self._group = self._group, None

        def leave(group: Any) -> None:
            with contextlib.suppress(RuntimeError):  # a group that is broken already
                group.abort()

        if group is not None:
            threading.Thread(target=leave, args=(group,), name=f"leave {self.name}", daemon=True).start()

    def _apart(self, call: Callable[[], T], watch: Watch, what: str) -> T:
        """Run what torch cannot be interrupted in; when a peer is lost meanwhile, it is left to its own deadline."""
        results: list[T] = []
        errors: list[Exception] = []
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

        def run() -> None:
            try:
                with torch.cuda.stream(stream):
                    results.append(call())
            except (RuntimeError, ValueError, OSError) as error:  # what torch raises when a peer does not come
                errors.append(error)

        threading.Thread(target=run, name=f"join {self.name}", daemon=True).start()
        watch.until(lambda: results or errors, what, self._patience_s)
        if errors:
            raise BroadcastFailed(f"{what}: {errors[0]}") from errors[0]
        return results[0]


def open_store(host: str, timeout_s: float) -> Store:
    """A store of this process for one group; `port` says where."""
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
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the process for a moment."""
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

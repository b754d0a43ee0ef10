"""One server's membership in the trainer's broadcasts: the server receives the bytes, this process directs it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from miles.rpc.gen import weightsource_pb2
from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.server.http_api import SglangApi
from miles.services.rollout.engines.sglang.weights import buckets
from miles.services.rollout.engines.sglang.weights.checker import Selector
from miles.services.rollout.engines.sglang.weights.remote import BucketContents, RemoteWeights
from miles.threads import Threads
from miles.weights.transports.collective.group import BroadcastFailed, Timing, Watch
from miles.weights.transports.collective.member import receive_from

_TORN = ("Failed to receive weights", "Failed to initialize custom process group")
"""How SGLang's message begins when a broadcast broke; another one may succeed."""


class ServerMember:
    """Receives versions into one server, in an open update session; implements Receiver.

    The server keeps a process group for each source. A thread follows the broadcast, while the event loop makes the
    HTTP calls to the server.
    """

    def __init__(self, api: SglangApi, ranks: int, timing: Timing | None = None) -> None:
        """`ranks`: how many the server has; each is a member of the groups and receives every byte."""
        self._api = api
        self._ranks = ranks
        self._timing = timing or Timing()
        self._name = f"server-{uuid.uuid4().hex[:12]}"
        self._groups: dict[str, str] = {}
        """Name of the group with each source."""
        self._wanted: Mapping[str, Sequence[BucketContents]] = {}
        self._set: dict[str, Any] = {}
        self._last = ""
        self._loop: asyncio.AbstractEventLoop
        self._answer: concurrent.futures.Future[dict[str, Any]] | None = None
        self._thread = Threads(1, thread_name_prefix="broadcast to SGLang")

    async def receive(self, weights: RemoteWeights, version: str | None, selector: Selector) -> None:
        """Receive every bucket; the last one sets the server's version, unless that is None.

        Raises ConnectionError or TimeoutError when the sources fail, EngineFailed or ServerRefused when the server
        does. When this raises, the server may hold parts of the version.
        """
        self._loop = asyncio.get_running_loop()
        self._wanted = weights.contents
        self._last = list(self._wanted)[-1]
        self._set = {"selector": selector, "weight_version": version}
        await self._loop.run_in_executor(self._thread, self._receive, weights.handle.publication_id)

    def close(self) -> None:
        """Follow no further broadcast; the server's groups end with the server."""
        self._thread.shutdown(wait=False)

    def _receive(self, publication_id: int) -> None:
        for source in [source for source in self._groups if source not in self._wanted]:
            self.leave(source)
        deadline_s = time.monotonic() + self._timing.deadline_s
        companions: list[str] = []
        for source in self._wanted:
            hello = weightsource_pb2.JoinHello(
                publication_id=publication_id,
                member=self._name,
                ranks=self._ranks,
                packed=True,
                companions=companions,
            )
            companions = receive_from(source, hello, self, deadline_s, self._timing)

    def join(self, source: str, ticket: weightsource_pb2.GroupTicket, watch: Watch) -> None:
        """See Receiver."""
        if self._groups.get(source) == ticket.group_name:
            return
        self.leave(source)
        self._groups[source] = ticket.group_name
        group = {
            "master_address": ticket.master_address,
            "master_port": ticket.master_port,
            "rank_offset": ticket.rank_offset,
            "world_size": ticket.world_size,
            "group_name": ticket.group_name,
            "backend": ticket.backend,
        }
        self._call("/init_weights_update_group", group, watch)

    def take(self, source: str, watch: Watch) -> None:
        """See Receiver."""
        contents = self._wanted[source]
        for i, bucket in enumerate(contents):
            is_last = source == self._last and i == len(contents) - 1
            body = {
                "names": bucket.names,
                "dtypes": bucket.dtypes,
                "shapes": bucket.shapes,
                "group_name": self._groups[source],
                "load_format": buckets.FORMAT,
                "flush_cache": False,
                **self._set,
            }
            self._call("/update_weights_from_distributed", body if is_last else body | {"weight_version": None}, watch)

    def leave(self, source: str) -> None:
        """See Receiver. Raises EngineFailed when the server was lost, or hangs in a broadcast that is over.

        A restarted server must not join a running broadcast: the others would wait for the member that is gone.
        """
        name = self._groups.pop(source, None)
        if name is None:
            return
        pending, self._answer = self._answer, None
        if pending is not None:
            concurrent.futures.wait([pending], timeout=self._timing.patience_s)
            if not pending.done():
                raise EngineFailed(f"SGLang at {self._api.address} hangs in a broadcast that is over")
            if isinstance(error := pending.exception(), EngineFailed):
                raise error
        with contextlib.suppress(ServerRefused, EngineFailed, BroadcastFailed, TimeoutError):
            watch = Watch(time.monotonic() + self._timing.patience_s)
            self._call("/destroy_weights_update_group", {"group_name": name}, watch)

    def _call(self, path: str, body: Mapping[str, Any], watch: Watch) -> None:
        timeout_s = 2 * self._timing.patience_s
        self._answer = asyncio.run_coroutine_threadsafe(self._api.post(path, body, timeout_s), self._loop)
        watch.until(self._answer.done, f"SGLang at {self._api.address} to answer {path}", timeout_s)
        answer, self._answer = self._answer, None
        try:
            answer.result()
        except ServerRefused as error:
            if error.message.startswith(_TORN):
                raise BroadcastFailed(str(error)) from error
            raise

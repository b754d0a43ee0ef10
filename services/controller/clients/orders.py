"""Orders that wait for one rollout. Leases that wait together are one message, which costs no more than one does."""

from __future__ import annotations

import asyncio
import collections

from miles.rpc.gen import rollout_pb2

_MESSAGE_BYTES = 1 << 20
"""Leases are put together up to this size: a message has a limit, and long ones keep others waiting."""


class Orders:
    """Orders of one work stream, in the order in which they were given."""

    def __init__(self) -> None:
        self._waiting: collections.deque[rollout_pb2.GroupLease | rollout_pb2.GroupPreempt] = collections.deque()
        self._any = asyncio.Event()

    def add(self, order: rollout_pb2.GroupLease | rollout_pb2.GroupPreempt) -> None:
        """Add an order."""
        self._waiting.append(order)
        self._any.set()

    async def next(self) -> rollout_pb2.RunRequest:
        """Return the message with the next order, and with the leases right behind it if that is a lease."""
        while not self._waiting:
            self._any.clear()
            await self._any.wait()
        first = self._waiting.popleft()
        if isinstance(first, rollout_pb2.GroupPreempt):
            return rollout_pb2.RunRequest(preempt=first)
        request = rollout_pb2.RunRequest()
        request.leases.leases.append(first)
        if self._waiting:
            self._add_leases(request.leases, first.ByteSize())
        return request

    def _add_leases(self, message: rollout_pb2.GroupLeases, nbytes: int) -> None:
        """Move the leases that wait, up to the next order of another kind, into a message that has `nbytes` bytes."""
        while self._waiting and isinstance(lease := self._waiting[0], rollout_pb2.GroupLease):
            nbytes += lease.ByteSize()
            if nbytes > _MESSAGE_BYTES:
                break
            self._waiting.popleft()
            message.leases.append(lease)

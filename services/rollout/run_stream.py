"""One Run stream: group leases in; progress and outcomes out, in the order they happen."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator

from miles.rpc.gen import rollout_pb2
from miles.services.rollout.groups.messages import (
    Failed,
    GroupLease,
    Outcome,
    Purpose,
    lease_from_proto,
    outcome_to_proto,
)
from miles.services.rollout.job import RolloutJob
from miles.types import MalformedMessage

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 1.0
_MESSAGE_BYTES = 1 << 20
"""Responses are put together up to this size; scored groups of an evaluation may be long."""


class RunStream:
    """Connects a job to the controller that leases groups to it, until either side ends the stream.

    `opening` is its first message; `lease_number` that of the worker lease under which it was opened.
    """

    def __init__(self, job: RolloutJob, opening: rollout_pb2.RunOpen) -> None:
        self.lease_number = opening.lease_number
        self._progress_interval_s = opening.progress_interval_ms / 1000 or PROGRESS_INTERVAL_S
        self._together = opening.takes_several
        self._job = job
        self._outgoing: asyncio.Queue[rollout_pb2.RunResponse | None] = asyncio.Queue()
        self._ended = False
        self._sent: rollout_pb2.RunReady | None = None

    async def responses(
        self, requests: AsyncIterator[rollout_pb2.RunRequest]
    ) -> AsyncGenerator[rollout_pb2.RunResponse, None]:
        """Carry out `requests` (after the opening one) and yield everything to send.

        Ends when `end` is called, or when the requests have ended and the groups they leased are preempted.
        """
        self._send_readiness()
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self.end())
        reporter = asyncio.create_task(self._report())
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(reporter.cancel)
            cleanup.callback(reader.cancel)
            cleanup.callback(self._job.listen(self._send_readiness))
            cleanup.callback(self.end)
            while (response := await self._outgoing.get()) is not None:
                yield self._with_what_waits(response) if self._together else response
            if reader.done():
                reader.result()

    def _with_what_waits(self, first: rollout_pb2.RunResponse) -> rollout_pb2.RunResponse:
        """Return one message with a response and those behind it: groups often finish at the same step."""
        several, nbytes = [first], first.ByteSize()
        while nbytes < _MESSAGE_BYTES and not self._outgoing.empty():
            if (response := self._outgoing.get_nowait()) is None:
                self._outgoing.put_nowait(None)  # the end, for the next turn
                break
            several.append(response)
            nbytes += response.ByteSize()
        if len(several) == 1:
            return first
        return rollout_pb2.RunResponse(
            lease_number=self.lease_number, several=rollout_pb2.RunResponses(responses=several)
        )

    def end(self) -> None:
        """Send nothing more than what is queued already."""
        self._ended = True
        self._outgoing.put_nowait(None)

    async def _read(self, requests: AsyncIterator[rollout_pb2.RunRequest]) -> None:
        async for request in requests:
            if self._ended:
                return
            match request.WhichOneof("kind"):
                case "lease":
                    self._lease(request.lease)
                case "leases":
                    for lease in request.leases.leases:
                        self._lease(lease)
                case "preempt":
                    preempt = request.preempt
                    purpose = next((p for p in Purpose if p.proto == preempt.purpose), None)
                    self._job.groups.preempt(preempt.group_id, preempt.attempt, purpose)
                case kind:
                    log.warning("ignoring a message of kind %s on the stream of job %s", kind, self._job.job_id)
        await self._job.groups.preempt_and_wait()

    def _lease(self, message: rollout_pb2.GroupLease) -> None:
        try:
            lease = lease_from_proto(message)
        except MalformedMessage as error:
            purpose = next((p for p in Purpose if p.proto == message.purpose), Purpose.TRAIN)
            failed = Failed(f"the lease is malformed: {error}", retryable=False)
            self._send(outcome_to_proto(message.group_id, message.attempt, purpose, failed, self.lease_number))
            return
        self._job.groups.start(lease, self._deliver, self.lease_number)

    def _deliver(self, lease: GroupLease, outcome: Outcome) -> None:
        if self._job.engine.stats().speculation is not None:
            self._send_progress()  # so that what a step's drafts were good for is known once the step has its groups
        response = outcome_to_proto(lease.group_id, lease.attempt, lease.purpose, outcome, self.lease_number)
        self._send(response)

    async def _report(self) -> None:
        while True:
            self._send_progress()
            await asyncio.sleep(self._progress_interval_s)

    def _send_progress(self) -> None:
        self._send(rollout_pb2.RunResponse(lease_number=self.lease_number, progress=self._job.progress()))

    def _send_readiness(self) -> None:
        serving = self._job.serving
        ready = rollout_pb2.RunReady(
            capacity_groups=self._job.capacity_groups,
            out_of_routing=serving.quarantine_reason,
            refused_weights=serving.refused_weights,
        )
        if ready != self._sent:
            self._sent = ready
            self._send(rollout_pb2.RunResponse(lease_number=self.lease_number, ready=ready))

    def _send(self, response: rollout_pb2.RunResponse) -> None:
        if self._ended:
            kind = response.WhichOneof("kind")
            log.info("job %s: a message of kind %s was not sent: the stream has ended", self._job.job_id, kind)
        else:
            self._outgoing.put_nowait(response)

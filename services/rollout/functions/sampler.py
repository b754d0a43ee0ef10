"""The sampler that has a function of the user's generate each response."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable

from miles.extensions.arguments import Args
from miles.extensions.loading import ExtensionError, ExtensionFailed, described
from miles.extensions.samples import Render, users_sample
from miles.services.rollout.functions.calls import SampleCalls
from miles.services.rollout.functions.endpoint import GenerateEndpoint
from miles.services.rollout.functions.function_thread import FunctionThread
from miles.services.rollout.functions.generate_function import GenerateFunction
from miles.services.rollout.functions.trajectory import finished_sample
from miles.services.rollout.groups.messages import GroupLease
from miles.services.rollout.groups.partial_response import without_response
from miles.services.rollout.groups.requests import GroupRequests
from miles.tasks import cancelled_at_end
from miles.types import Sample

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class FunctionTools:
    """What the generate function of a job runs with."""

    name: str
    function: GenerateFunction
    thread: FunctionThread
    endpoint: GenerateEndpoint
    settings: dict[str, object]
    """Attributes of `args`, apart from the endpoint's address."""
    render: Render
    timeout_s: float
    version: Callable[[], int]
    """The weight version that the engine serves."""


class FunctionSampler:
    """Calls the function once for each sample of a group. A response that was preempted starts over."""

    def __init__(self, tools: FunctionTools, requests: GroupRequests, lease: GroupLease) -> None:
        self._tools = tools
        self._requests = requests
        self._lease = lease
        self._aborted = asyncio.Event()

    async def respond(self, position: int, sample: Sample) -> AsyncGenerator[Sample, None]:
        """Yield the sample once, with the trajectory; nothing after an abort."""
        leased = without_response(sample)
        calls = SampleCalls(self._requests, position, self._lease.sampling[position].seed)
        with self._tools.endpoint.registered(calls) as host:
            running = asyncio.create_task(self._call(position, leased, host))
            aborts = [asyncio.create_task(event.wait()) for event in (self._aborted, calls.aborted)]
            async with cancelled_at_end(running, *aborts):
                await asyncio.wait([running, *aborts], return_when=asyncio.FIRST_COMPLETED)
                if self._aborted.is_set() or calls.aborted.is_set():
                    return
                returned = running.result()
        trained_as = self._lease.sampling[position] if self._lease.is_training else None
        try:
            yield finished_sample(leased, returned, calls.made, trained_as=trained_as, version=self._tools.version())
        except ExtensionError as error:
            subject = f"sample {sample.index} of group {sample.group_id}"
            raise ExtensionError(f"{self._tools.name}: {subject}: {error}") from None

    async def _call(self, position: int, leased: Sample, host: str) -> object:
        tools, lease = self._tools, self._lease
        args = Args(**tools.settings, sglang_router_ip=host, sglang_router_port=tools.endpoint.port)
        seen = users_sample(leased, group_size=len(lease.group.samples), render=tools.render)
        sampling = lease.sampling[position]
        params = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_new_tokens": sampling.max_new_tokens,
            "min_new_tokens": sampling.min_new_tokens,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(sampling.stop_token_ids) or None,
            "skip_special_tokens": lease.skip_special_tokens[position],
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
        }
        deadline = asyncio.timeout(tools.timeout_s)
        try:
            async with deadline:
                return await tools.thread.run(lambda: tools.function(args, seen, params, not lease.is_training))
        except Exception as error:  # the user's code may raise anything
            subject = f"{tools.name} on sample {leased.index} of group {leased.group_id}"
            if deadline.expired():
                problem = f"{subject} did not return within {tools.timeout_s:g} s (custom_generate_timeout_s)"
                raise ExtensionFailed(problem) from None
            log.warning("%s raised an error", subject, exc_info=error)
            raise ExtensionFailed(f"{subject} raised {described(error)}") from error

    async def abort(self) -> None:
        """Cancel the functions and end their requests."""
        self._aborted.set()
        await self._requests.abort()

"""What a reward service does, without its gRPC: knows the reward functions and scores requests with them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from miles.cores import usable_cores
from miles.reward_sdk import outcome
from miles.reward_sdk.functions import RewardLoadError, Source
from miles.reward_sdk.pool import ASYNC_CALLS_PER_WORKER, StillRunning, WorkerPool
from miles.reward_sdk.worker_process import Described, WorkerDied, WorkerProcess
from miles.rpc.gen import reward_pb2, sample_pb2
from miles.telemetry.tracing import traced

DEFAULT_DEADLINE_S = 60.0
"""For requests that name no deadline."""
_LATE_S = 0.2
"""How long past the deadline a pool may take to report what went wrong."""
_PATIENCE_S = 0.5
"""How long samples that share a call are waited for. They were expected to take milliseconds; but on a busy machine a
process may stand still for a while, and calling all of them again would make that worse."""
_HUNG_S = 5.0
"""How long such a call may run, once it has a process, before that is killed: the slow sample has been called on its
own since."""


class Scorer:
    """Scores requests in worker processes, so that no function can end or block the service."""

    def __init__(self, sources: Sequence[Source], first: WorkerProcess, workers: int) -> None:
        self.functions: dict[str, Described] = {function.name: function for function in first.functions}
        self.default = next(iter(self.functions))
        self.running = 0
        """Samples being scored now."""
        self.scored = 0
        """Samples answered since the start, with a score or an error."""
        self.failed = 0
        """Of those, the errors."""
        self._blocking = WorkerPool(sources, size=workers, capacity=1)
        self._asynchronous = WorkerPool(sources, size=workers, capacity=ASYNC_CALLS_PER_WORKER)
        only_async = all(function.is_async for function in first.functions)
        (self._asynchronous if only_async else self._blocking).adopt(first)

    @classmethod
    async def start(cls, sources: Sequence[Source], *, workers: int = 0, default: str = "") -> Scorer:
        """Start the first worker process and learn the functions from it.

        Args:
            sources: where the functions are.
            workers: worker processes at most, for each of blocking and asynchronous functions; 0 means one a core.
            default: the function for requests that name none; empty means the first.

        Raises:
            RewardLoadError: when a source cannot be loaded or there is no function named `default`.
        """
        scorer = cls(sources, await WorkerProcess.start(sources), workers or usable_cores())
        if default and default not in scorer.functions:
            await scorer.close()
            raise RewardLoadError(f"the default reward {default!r} is none of {', '.join(scorer.functions)}")
        scorer.default = default or scorer.default
        return scorer

    @traced("score a request")
    async def score(self, request: reward_pb2.ScoreRequest) -> list[reward_pb2.Score]:
        """Return a score or error score for each sample, in order, by the request's deadline."""
        deadline = time.monotonic() + (request.deadline_ms / 1000 or DEFAULT_DEADLINE_S)
        name = request.reward or self.default
        self.running += len(request.samples)
        try:
            scores = await self._score(name, request, deadline)
        finally:
            self.running -= len(request.samples)
        self.scored += len(scores)
        self.failed += sum(score.WhichOneof("kind") == "error" for score in scores)
        return scores

    async def _score(self, name: str, request: reward_pb2.ScoreRequest, deadline: float) -> list[reward_pb2.Score]:
        function = self.functions.get(name)
        if not request.samples:
            return []
        if function is None:
            problem = f"this service has no reward {name!r}; it has {', '.join(self.functions)}"
        elif function.group and not request.group:
            problem = f"reward {name!r} scores whole groups; ask for it with group set (--group-rm)"
        elif function.group:
            return await self._call(function, request.samples, deadline)
        else:
            shares = [request.samples[share] for share in self.shares(name, len(request.samples))]
            if len(shares) == 1:
                return await self._call_each(function, shares[0], deadline)
            calls = (self._call_each(function, samples, deadline) for samples in shares)
            return [score for scores in await asyncio.gather(*calls) for score in scores]
        return [outcome.error_score(problem) for _ in request.samples]

    def shares(self, name: str, samples: int) -> list[slice]:
        """Which of so many samples of a request the function of this name would get in one call."""
        return self._pool(self.functions[name]).shares(name, samples)

    def _pool(self, function: Described) -> WorkerPool:
        return self._asynchronous if function.is_async else self._blocking

    async def _call_each(
        self, function: Described, samples: Sequence[sample_pb2.Sample], deadline: float
    ) -> list[reward_pb2.Score]:
        """Score samples independently: in one call, then each in its own if one is slow or ends the process."""
        if len(samples) > 1:
            request = reward_pb2.ScoreRequest(reward=function.name, samples=samples)
            with contextlib.suppress(StillRunning, TimeoutError, WorkerDied, RewardLoadError):
                return await self._pool(function).score(request, deadline, patience_s=_PATIENCE_S, run_s=_HUNG_S)
        calls = (self._call(function, [sample], deadline) for sample in samples)
        return [score for scores in await asyncio.gather(*calls) for score in scores]

    async def _call(
        self, function: Described, samples: Sequence[sample_pb2.Sample], deadline: float
    ) -> list[reward_pb2.Score]:
        request = reward_pb2.ScoreRequest(reward=function.name, samples=samples)
        try:
            async with asyncio.timeout(deadline + _LATE_S - time.monotonic()):
                return await self._pool(function).score(request, deadline)
        except (TimeoutError, WorkerDied, RewardLoadError) as error:
            reason = str(error) or "did not end by its deadline"
        return [outcome.error_score(f"reward {function.name!r} {reason}: {outcome.sample_id(s)}") for s in samples]

    async def close(self) -> None:
        """End the worker processes."""
        await asyncio.gather(self._blocking.close(), self._asynchronous.close())

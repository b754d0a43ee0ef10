"""A pool of worker processes that grows with the load, kills processes that hang and replaces those that died."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import math
import time
from collections.abc import Sequence

from miles.reward_sdk.functions import RewardLoadError, Source
from miles.reward_sdk.growth import LOAD_S, workers_to_start
from miles.reward_sdk.pace import Pace
from miles.reward_sdk.worker_process import WorkerDied, WorkerProcess
from miles.rpc.gen import reward_pb2
from miles.tasks import cancel

logger = logging.getLogger(__name__)

_ASYNC_GRACE_S = 1.0
"""How long an asynchronous function may take to end after it was cancelled at its deadline."""
_RETRY_S = 10.0
"""How long after a failed start no further one is tried while there are workers."""
ASYNC_CALLS_PER_WORKER = 256
"""Asynchronous calls that one worker process runs at once."""


class StillRunning(RuntimeError):
    """A call has run for as long as its caller wanted to wait. It goes on in its process until it ends or is killed."""


@dataclasses.dataclass(slots=True)
class _Call:
    """A call of a function with samples of a request."""

    request: reward_pb2.ScoreRequest
    deadline: float
    """A `time.monotonic()`."""
    run_s: float
    """How long it may run once it has a worker."""
    noted: bool = False
    """Whether its time is in the pace of its function already."""


class WorkerPool:
    """Worker processes for one kind of function: blocking ones (capacity 1 each) or asynchronous ones.

    At most `size` processes run at once, those included that were killed and have not ended. The first starts when it
    is needed, more in the background when calls have waited for a while. A call takes whichever worker is free first.
    A call that outlives its deadline has its process killed, and calls that shared the process with it are run again
    once.
    """

    def __init__(self, sources: Sequence[Source], *, size: int, capacity: int) -> None:
        self.paces: collections.defaultdict[str, Pace] = collections.defaultdict(Pace)
        """How fast each function is, by name."""
        self._sources = sources
        self._size = size
        self._capacity = capacity
        self._workers: list[WorkerProcess] = []
        """Also those that were killed, until their processes have ended and what they hold is free, as GPU memory."""
        self._waiting: collections.deque[tuple[float, asyncio.Future[WorkerProcess]]] = collections.deque()
        """Calls that wait for a worker, in the order in which they get one, and since when (`time.monotonic()`)."""
        self._starting: set[asyncio.Task[WorkerProcess]] = set()
        self._load_counts_from = 0.0
        """Waiting before this time, a `time.monotonic()`, shows nothing about the workers there are now."""
        self._next_look: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[list[reward_pb2.Score]]] = set()
        self._closed = False

    def adopt(self, worker: WorkerProcess) -> None:
        """Add a worker that was started elsewhere with the same sources."""
        self._workers.append(worker)
        worker.when_gone(self._gone)

    def shares(self, function: str, samples: int) -> list[slice]:
        """Split so many samples of a request into calls: one each, or several for a blocking function that is fast."""
        if self._capacity > 1:
            return [slice(i, i + 1) for i in range(samples)]
        return self.paces[function].shares(samples)

    async def score(
        self,
        request: reward_pb2.ScoreRequest,
        deadline: float,
        *,
        patience_s: float = math.inf,
        run_s: float = math.inf,
    ) -> list[reward_pb2.Score]:
        """Run one call by `deadline`, a `time.monotonic()`, and for `run_s` seconds at most once it has a worker.

        Raises `TimeoutError` past the deadline or `run_s`, `WorkerDied` when the function ends its process,
        `RewardLoadError` when there is no process and none can be started, and `StillRunning` when the call has run for
        `patience_s` seconds. Cancelling removes a call that waits; one that runs keeps its process to the end.
        """
        worker = await self._take_worker(deadline)
        call = _Call(request, deadline, run_s)
        task = asyncio.create_task(self._run(worker, call))
        self._running.add(task)
        task.add_done_callback(self._finished)
        if patience_s < math.inf:
            await asyncio.wait({task}, timeout=patience_s)
            if not task.done():
                self._note(call, patience_s, len(request.samples))  # at once, for the requests that come meanwhile
                raise StillRunning
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[list[reward_pb2.Score]]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, as the caller may be gone

    def _note(self, call: _Call, seconds: float, samples: int) -> None:
        if not call.noted:
            call.noted = True
            self.paces[call.request.reward].note(seconds, samples)

    async def _run(self, worker: WorkerProcess, call: _Call) -> list[reward_pb2.Score]:
        attempts = 1 if self._capacity == 1 else 2  # a call that ran alone in a process that died has killed it
        while True:
            attempts -= 1
            try:
                return await self._call(worker, call)
            except WorkerDied:
                if not attempts:
                    raise
            finally:
                self._give_back(worker)
            worker = await self._take_worker(call.deadline)

    async def _call(self, worker: WorkerProcess, call: _Call) -> list[reward_pb2.Score]:
        request = call.request
        left = min(call.deadline - time.monotonic(), call.run_s)
        if left <= 0:
            raise TimeoutError("waited to its deadline for a free worker")
        request.deadline_ms = max(1, int(left * 1000))
        try:
            async with asyncio.timeout(left + (_ASYNC_GRACE_S if self._capacity > 1 else 0)):
                answer = await worker.call(request)
        except TimeoutError:
            logger.warning("killing a worker process: reward %r did not end in %.3g s", request.reward, left)
            worker.kill()
            self._note(call, left, len(request.samples))
            raise TimeoutError(f"did not end in {left:.3g} s; its process was killed") from None
        self._note(call, answer.seconds, answer.calls)
        return answer.scores

    async def _take_worker(self, deadline: float) -> WorkerProcess:
        """Wait for a worker with room for a call, which is counted: the first that is free, becomes free or starts."""
        if self._closed:
            raise WorkerDied("the worker processes have ended")
        worker = None if self._waits() else self._free_worker()
        if worker is not None:
            worker.calls += 1
            return worker
        future: asyncio.Future[WorkerProcess] = asyncio.get_running_loop().create_future()
        self._waiting.append((time.monotonic(), future))
        self._start_workers()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await future
        except (TimeoutError, asyncio.CancelledError) as error:
            if not future.cancelled() and future.exception() is None:  # a worker came as the call stopped waiting
                self._give_back(future.result())
            if isinstance(error, asyncio.CancelledError):
                raise
            busy = f"{len(self._running)} calls run in {len(self._workers)} worker processes, {self._size} at most"
            raise TimeoutError(f"waited to its deadline for a free worker ({busy})") from None

    def _give_back(self, worker: WorkerProcess) -> None:
        worker.calls -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        """Give free workers to the calls that wait."""
        while self._waits() and (worker := self._free_worker()) is not None:
            worker.calls += 1
            self._waiting.popleft()[1].set_result(worker)
        self._start_workers()

    def _waits(self) -> bool:
        """Whether a call waits; the first in the queue is one, as those that have stopped waiting are removed."""
        while self._waiting and self._waiting[0][1].done():
            self._waiting.popleft()
        return bool(self._waiting)

    def _free_worker(self) -> WorkerProcess | None:
        free = [worker for worker in self._workers if worker.alive and worker.calls < self._capacity]
        return min(free, key=lambda worker: worker.calls, default=None)

    def _start_workers(self) -> None:
        """Start workers if the load shows that they are needed, or look again when it may."""
        if self._starting or self._closed or not self._waits() or len(self._workers) >= self._size:
            return
        alive = self._alive()
        waited_s = time.monotonic() - max(self._waiting[0][0], self._load_counts_from)
        count = workers_to_start(
            workers=alive,
            waiting=sum(not future.done() for _, future in self._waiting),
            waited_s=waited_s,
            size=self._size - (len(self._workers) - alive),
            capacity=self._capacity,
        )
        for _ in range(count):
            task = asyncio.create_task(WorkerProcess.start(self._sources))
            self._starting.add(task)
            task.add_done_callback(self._started)
        if not count and self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(LOAD_S - waited_s, self._look)

    def _alive(self) -> int:
        return sum(worker.alive for worker in self._workers)

    def _look(self) -> None:
        self._next_look = None
        self._start_workers()

    def _started(self, task: asyncio.Task[WorkerProcess]) -> None:
        self._starting.discard(task)
        if task.cancelled():
            return
        self._load_counts_from = time.monotonic()
        if (error := task.exception()) is None:
            self.adopt(task.result())
            if self._closed:  # it had started just before
                task.result().kill()
        elif self._alive() or self._starting:
            self._load_counts_from += _RETRY_S
            logger.warning("no further worker process could be started, %d go on: %s", self._alive(), error)
        else:
            self._fail_waiting(RewardLoadError, str(error))
        self._hand_out()

    def _gone(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        self._start_workers()

    def _fail_waiting(self, kind: type[Exception], problem: str) -> None:
        while self._waits():
            self._waiting.popleft()[1].set_exception(kind(problem))

    async def close(self) -> None:
        """Kill every worker process; calls that run or wait raise `WorkerDied`."""
        self._closed = True
        if self._next_look is not None:
            self._next_look.cancel()
        self._fail_waiting(WorkerDied, "the worker processes have ended")
        await cancel(*self._starting)
        await asyncio.gather(*(worker.close() for worker in self._workers))

"""The thread that owns the model: it steps, and between steps it carries out what the event loop asks for."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, TypeVar

import torch

from miles.services.rollout.engine import FinishReason, GenerationDelta, PauseMode
from miles.services.rollout.engines.torch import invariance
from miles.services.rollout.engines.torch.forward import MIN_ROWS, Forward, pack
from miles.services.rollout.engines.torch.kv_cache import KVCache
from miles.services.rollout.engines.torch.model import build_empty_model, model_shape
from miles.services.rollout.engines.torch.parameters import Parameters
from miles.services.rollout.engines.torch.routing import RoutingRecorder
from miles.services.rollout.engines.torch.sampling import Draw, sample
from miles.services.rollout.engines.torch.scheduler import Plan, Scheduler
from miles.services.rollout.engines.torch.sequence import Sequence

logger = logging.getLogger(__name__)

T = TypeVar("T")
Delivery = tuple[str, GenerationDelta | BaseException]


class EngineFailed(RuntimeError):
    """A step raised; the engine serves nothing more until it is built anew."""


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What the worker is built from."""

    dtype: torch.dtype
    device: torch.device
    max_running_requests: int
    max_total_tokens: int
    max_prefill_tokens: int
    experts_implementation: str
    threads: int | None


class Worker:
    """Steps the model in a thread of its own. Methods marked "between steps" run there, through `submit`."""

    def __init__(self, config: Any, options: WorkerOptions, deliver: Callable[[list[Delivery]], None]) -> None:
        self._config = config
        self._options = options
        self._deliver = deliver
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._scheduler = Scheduler(options.max_running_requests, options.max_prefill_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._outbox: list[Delivery] = []
        self._paused = False
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self.version: int | None = None
        self.generated_tokens = 0
        self.busy_s = 0.0

    def start(self) -> concurrent.futures.Future[None]:
        """Start the thread, which builds the model first; done when it has."""
        self._thread.start()
        return self.submit(self._build)

    def submit(self, call: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run `call` between two steps."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._commands.put((call, future))
        return future

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end after `close`; says whether it did."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def running_requests(self) -> int:
        """Requests that hold a slot."""
        return len(self._scheduler.running)

    @property
    def waiting_requests(self) -> int:
        """Requests that wait for a slot."""
        return len(self._scheduler.waiting)

    # Between steps.

    def _build(self) -> None:
        options = self._options
        torch.set_num_threads(options.threads or torch.get_num_threads())
        shape = model_shape(self._config)
        model = build_empty_model(self._config, options.dtype, options.device, options.experts_implementation)
        self.parameters = Parameters(model, options.device)
        self._recorder = RoutingRecorder(model)
        queries = invariance.min_query_rows(shape, options.dtype, options.device)
        faults = invariance.dependent_shapes(shape, options.dtype, options.device)
        if queries is None:
            faults.append("attention")
        if faults:
            logger.warning(
                "this machine's %s matmul computes a row differently beside different numbers of rows (%s): responses "
                "may depend on the requests beside them and a seed may not reproduce",
                options.dtype,
                ", ".join(faults),
            )
        cache = KVCache(
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_slots=options.max_running_requests,
            max_length=options.max_total_tokens,
            dtype=options.dtype,
            device=options.device,
        )
        self._forward = Forward(
            model, cache, dtype=options.dtype, device=options.device, min_queries=queries or MIN_ROWS
        )

    def add(self, sequence: Sequence) -> None:
        """Between steps: take a request."""
        if self._recorder.layers == 0:
            sequence.routing = None
        if sequence.response_length >= sequence.request.sampling.max_new_tokens:
            self._outbox.append(
                (sequence.request.request_id, GenerationDelta((), (), sequence.result(FinishReason.LENGTH)))
            )
            return
        self._sequences[sequence.request.request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_ids: Seq[str] | None) -> None:
        """Between steps: end these requests (None: all) with what they have; unknown ids have ended already."""
        for request_id in list(self._sequences) if request_ids is None else request_ids:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._end(sequence, GenerationDelta((), (), sequence.result(FinishReason.ABORT)))

    def pause(self, mode: PauseMode) -> None:
        """Between steps: take no further step."""
        self._paused = True
        if mode is PauseMode.RETRACT:
            self._scheduler.retract_all()
        elif mode is PauseMode.ABORT:
            self.abort(None)

    def resume(self) -> None:
        """Between steps: go on."""
        self._paused = False

    def load(self, version: int, checked: Mapping[str, torch.Tensor]) -> float:
        """Between steps: serve these weights; returns how long it took, in seconds."""
        begin = time.perf_counter()
        self.parameters.swap(checked)
        self._scheduler.weights_changed()
        self.version = version
        if self._options.device.type == "cuda":
            torch.cuda.synchronize(self._options.device)
        return time.perf_counter() - begin

    def close(self) -> None:
        """Between steps: abort everything and end the thread."""
        self.abort(None)
        self._closed = True

    # The loop.

    def _run(self) -> None:
        while not self._closed:
            self._obey()
            if not self._closed and self._can_step():
                self._step_or_fail()
            self._flush()

    def _can_step(self) -> bool:
        return not self._paused and self._failure is None and self.version is not None and bool(self._sequences)

    def _obey(self) -> None:
        """Carry out the commands that wait; wait for one when there is no step to take."""
        block = not self._can_step()
        while True:
            try:
                call, future = self._commands.get(block=block)
            except queue.Empty:
                return
            block = False
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if self._failure is not None and call != self.close:
                    raise EngineFailed("an earlier step of the engine failed") from self._failure
                result = call()
            except Exception as error:
                future.set_exception(error)
            else:
                self._flush()
                future.set_result(result)

    def _step_or_fail(self) -> None:
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                self._step()
        except Exception as error:
            logger.exception("a step of the engine failed")
            self._failure = error
            self._outbox = [(request_id, error) for request_id in self._sequences]
            self._sequences.clear()
        self.busy_s += time.perf_counter() - begin

    def _step(self) -> None:
        plan = self._scheduler.plan()
        self._forward.prepare(plan)
        self._share_routing(plan, before=True)
        packed = pack(plan)
        self._recorder.enabled = any(
            sequence.routing is not None for sequence in (*plan.decode, *(chunk.sequence for chunk in plan.prefill))
        )
        logits_RV = self._forward.run(plan, packed)
        if self._recorder.enabled:
            self._record_routing(plan, len(packed.tokens))
        self._share_routing(plan, before=False)
        draws = [
            Draw(
                params=sequence.request.sampling,
                token_index=sequence.response_length,
                banned=sequence.stop_rule.banned(sequence.response_length),
            )
            for sequence in packed.drawing
        ]
        if draws:
            for sequence, token, log_prob in zip(packed.drawing, *sample(logits_RV, draws), strict=True):
                self._take_token(sequence, token, log_prob)

    def _take_token(self, sequence: Sequence, token: int, log_prob: float) -> None:
        assert self.version is not None
        self.generated_tokens += 1
        reason = sequence.append(token, self.version)
        if reason is None:
            self._outbox.append((sequence.request.request_id, GenerationDelta((token,), (log_prob,))))
        else:
            self._end(sequence, GenerationDelta((token,), (log_prob,), sequence.result(reason)))

    def _end(self, sequence: Sequence, last: GenerationDelta) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.request_id]
        self._outbox.append((sequence.request.request_id, last))

    def _record_routing(self, plan: Plan, tokens: int) -> None:
        choices_NLK = self._recorder.take(tokens)
        for row, sequence in enumerate(plan.decode):
            if sequence.routing is not None:
                sequence.routing.extend(len(sequence.tokens) - 1, choices_NLK[row : row + 1])
        row = len(plan.decode)
        for chunk in plan.prefill:
            length = chunk.end - chunk.start
            if chunk.sequence.routing is not None:
                chunk.sequence.routing.extend(chunk.start, choices_NLK[row : row + length])
            row += length

    @staticmethod
    def _share_routing(plan: Plan, *, before: bool) -> None:
        for copy in plan.copies if before else plan.shares:
            if copy.target.routing is not None and copy.source.routing is not None:
                copy.target.routing.extend(0, copy.source.routing.prefix(copy.length))

    def _flush(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._deliver(outbox)

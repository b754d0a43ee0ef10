"""Has every worker write down what it did in the steps that are to be traced."""

from __future__ import annotations

import asyncio
import json
import pathlib
import time
from collections.abc import Iterable, Mapping

from miles.rpc.gen import controller_pb2
from miles.services.controller.run.report import RunReport
from miles.services.controller.workers.registry import WorkerRegistry
from miles.telemetry.trace_files import PHASES
from miles.telemetry.tracing import spans_file, write_spans

_OWN = "controller"
_WRITTEN_DEADLINE_S = 60.0
"""How long the end of a run waits for traces; workers hear of them at their next heartbeat."""
_LOOK_S = 0.1

Phases = Mapping[str, tuple[float, float]]
"""Begin and end of each part of a step, in seconds of the monotonic clock."""


class StepTraces:
    """Traces chosen steps into a folder each, below one folder that all workers share."""

    def __init__(self, folder: pathlib.Path, steps: Iterable[int], registry: WorkerRegistry, report: RunReport) -> None:
        self._folder = folder
        self._steps = frozenset(steps)
        self._registry = registry
        self._report = report
        self._expected: set[pathlib.Path] = set()

    async def note(self, step: int, phases: Phases) -> None:
        """Trace a step that has just been taken, if it is one of those."""
        if step not in self._steps:
            return
        folder = (self._folder / f"step-{step}").absolute()
        offset_ns = time.time_ns() - time.monotonic_ns()
        parts = {name: [int(at_s * 1e9) + offset_ns for at_s in both] for name, both in phases.items()}
        begin_ns, end_ns = min(begin for begin, _ in parts.values()), max(end for _, end in parts.values())
        order = controller_pb2.TraceOrder(folder=str(folder), begin_unix_ns=begin_ns, end_unix_ns=end_ns)
        try:
            await asyncio.to_thread(write_spans, folder, _OWN, begin_ns, end_ns)
            (folder / PHASES).write_text(json.dumps({"step": step, "phases": parts}))
        except OSError as error:  # a trace is no reason to stop
            await self._report.warn(f"no trace of step {step} is written: {error}")
            return
        for worker in self._registry.everyone():
            worker.traces.append(order)
            self._expected.add(spans_file(folder, worker.worker_id))

    async def wait_until_written(self) -> None:
        """Wait until every worker has written its part, or say which has not."""
        deadline_s = time.monotonic() + _WRITTEN_DEADLINE_S
        while missing := sorted(str(file) for file in self._expected if not file.exists()):
            if time.monotonic() > deadline_s:
                await self._report.warn(
                    f"{', '.join(missing)}: not written {_WRITTEN_DEADLINE_S:g} s after the last step; a trace lacks a "
                    f"worker that was lost or does not share the folder"
                )
                break
            await asyncio.sleep(_LOOK_S)
        self._expected.clear()

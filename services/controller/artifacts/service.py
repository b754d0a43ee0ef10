"""The gRPC service for what jobs leave behind: reads only, in threads, so that the run loop never waits for a disk."""

from __future__ import annotations

import asyncio
import collections
import json
import pathlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeAlias

import grpc.aio

from miles.rpc.gen import records_pb2, records_pb2_grpc
from miles.services.controller.artifacts import logs as log_files
from miles.services.controller.artifacts import samples as sample_files
from miles.services.controller.artifacts.checkpoints import CheckpointFiles
from miles.services.controller.artifacts.log_spans import LogSpans
from miles.services.controller.artifacts.metrics import MetricLog
from miles.services.controller.artifacts.token_tables import TokenTables
from miles.services.controller.errors import NotPossibleNowError, ending_call
from miles.services.controller.jobs.history import METRICS_NAME
from miles.services.controller.jobs.records import is_unreadable
from miles.services.controller.jobs.store import JobStore, check_event_id
from miles.services.controller.status import timeline

SERVICE_NAME = records_pb2.DESCRIPTOR.services_by_name["RecordsService"].full_name
_MAX_PAGE = 1000
_LOGS_IN_MEMORY = 16
"""Jobs whose metrics stay parsed."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RecordsServicer(records_pb2_grpc.RecordsServiceServicer):
    """Serves the gateway; see records.proto.

    `log_dir` holds the logs of all processes; without one, a job's are looked for in its run folder.
    """

    def __init__(self, store: JobStore, log_dir: pathlib.Path | None = None) -> None:
        self._store = store
        self._log_dir = log_dir
        self._token_tables = TokenTables()
        self._metrics: collections.OrderedDict[str, tuple[MetricLog, asyncio.Lock]] = collections.OrderedDict()

    async def ListEvents(
        self, request: records_pb2.ListEventsRequest, context: Context
    ) -> records_pb2.ListEventsResponse:
        async with ending_call(context):
            await self._store.get(request.job_id)
            check_event_id(request.after_event_id)
        size = min(request.page_size or 500, _MAX_PAGE)
        return records_pb2.ListEventsResponse(
            events=await self._store.events(request.job_id, request.after_event_id, size)
        )

    async def ListMetrics(
        self, request: records_pb2.ListMetricsRequest, context: Context
    ) -> records_pb2.ListMetricsResponse:
        run_dir = await self._run_dir(request.job_id, context)
        if request.job_id not in self._metrics:
            self._metrics[request.job_id] = MetricLog(run_dir / METRICS_NAME), asyncio.Lock()
            if len(self._metrics) > _LOGS_IN_MEMORY:
                self._metrics.popitem(last=False)
        log, turn = self._metrics[request.job_id]
        self._metrics.move_to_end(request.job_id)
        async with turn:
            await asyncio.to_thread(log.refresh)
            return await asyncio.to_thread(log.select, request)

    async def ListSamples(
        self, request: records_pb2.ListSamplesRequest, context: Context
    ) -> records_pb2.ListSamplesResponse:
        run_dir = await self._run_dir(request.job_id, context)
        wanted = sample_files.SampleFilter(
            step=request.step if request.HasField("step") else None,
            min_reward=request.min_reward if request.HasField("min_reward") else None,
            max_reward=request.max_reward if request.HasField("max_reward") else None,
        )
        size = min(request.page_size or 50, _MAX_PAGE)
        async with ending_call(context):
            samples, token = await asyncio.to_thread(
                sample_files.list_samples, run_dir, wanted, size, request.page_token
            )
        return records_pb2.ListSamplesResponse(samples=samples, next_page_token=token)

    async def GetSample(self, request: records_pb2.GetSampleRequest, context: Context) -> records_pb2.GetSampleResponse:
        settings = await self._settings(request.job_id, context)
        place = (request.step, request.group_id, request.index)
        async with ending_call(context):
            sample, tokens = await asyncio.to_thread(sample_files.find_sample, pathlib.Path(settings["run_dir"]), place)
        table = None if tokens is None else await asyncio.to_thread(self._token_tables.make, settings, tokens)
        return records_pb2.GetSampleResponse(sample=sample, tokens=table)

    async def ListActivity(
        self, request: records_pb2.ListActivityRequest, context: Context
    ) -> records_pb2.ListActivityResponse:
        path = await self._run_dir(request.job_id, context) / timeline.NAME
        spans = await asyncio.to_thread(timeline.read_timeline, path, request.after_unix_s, request.limit)
        return records_pb2.ListActivityResponse(spans=spans)

    async def ListCheckpoints(
        self, request: records_pb2.ListCheckpointsRequest, context: Context
    ) -> records_pb2.ListCheckpointsResponse:
        files = CheckpointFiles(await self._settings(request.job_id, context))
        return records_pb2.ListCheckpointsResponse(checkpoints=await asyncio.to_thread(files.find))

    async def ReadExport(
        self, request: records_pb2.ReadExportRequest, context: Context
    ) -> AsyncIterator[records_pb2.ReadExportResponse]:
        files = CheckpointFiles(await self._settings(request.job_id, context))
        async with ending_call(context):
            pieces = await asyncio.to_thread(files.open_export, request.step, request.name, request.offset_bytes)
        while piece := await asyncio.to_thread(_next, pieces):
            yield records_pb2.ReadExportResponse(data=piece)

    async def ListLogs(self, request: records_pb2.ListLogsRequest, context: Context) -> records_pb2.ListLogsResponse:
        folder, spans = await self._logs(request.job_id, context)
        return records_pb2.ListLogsResponse(files=await asyncio.to_thread(log_files.list_logs, folder, spans))

    async def ReadLog(self, request: records_pb2.ReadLogRequest, context: Context) -> records_pb2.ReadLogResponse:
        folder, spans = await self._logs(request.job_id, context)
        offset = request.offset_bytes if request.HasField("offset_bytes") else None
        async with ending_call(context):
            return await asyncio.to_thread(log_files.read_log, folder, spans, request.name, offset, request.limit_bytes)

    async def _settings(self, job_id: str, context: Context) -> dict[str, Any]:
        async with ending_call(context):
            job = await self._store.get(job_id)
            if is_unreadable(job):
                raise NotPossibleNowError(job.error)
            settings: dict[str, Any] = json.loads(job.config_json)
        return settings

    async def _run_dir(self, job_id: str, context: Context) -> pathlib.Path:
        return pathlib.Path((await self._settings(job_id, context))["run_dir"])

    async def _logs(self, job_id: str, context: Context) -> tuple[pathlib.Path, LogSpans]:
        run_dir = await self._run_dir(job_id, context)
        folder = self._log_dir or run_dir / "logs"
        return folder, LogSpans(run_dir, folder)


def _next(pieces: Iterator[bytes]) -> bytes:
    return next(pieces, b"")

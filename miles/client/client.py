"""Calls to a gateway."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from miles.client.errors import GatewayUnreachableError, MilesError, UnexpectedAnswerError
from miles.client.events import parse_events

DEFAULT_URL = "http://127.0.0.1:8000"
URL_ENVIRONMENT, KEY_ENVIRONMENT = "MILES_URL", "MILES_API_KEY"
_SILENCE_S = 60.0
"""An event stream says at least every 15 s that it lives."""
_RETRY_S = 1.0
_RETRIES = 5
"""Times that a request is sent when the controller is away for a moment."""
_PASSING = frozenset({"controller-away", "too-many-requests", "too-many-watchers"})
"""Refusals that are over in a moment."""
_WATCH_RETRIES = 30
"""Times that a watcher tries to reach a gateway again."""

Json = dict[str, Any]


class MilesClient:
    """One gateway. Use as a context manager, or call `close`.

    Every method raises MilesError when the gateway refuses, GatewayUnreachableError when nothing answers, and
    UnexpectedAnswerError when what answers is no gateway. What they return has the shapes of the OpenAPI document.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        verify: bool | str = True,
    ) -> None:
        """`url` and `api_key` default to $MILES_URL and $MILES_API_KEY; `verify` may name a file of authorities."""
        self.url = (url or os.environ.get(URL_ENVIRONMENT) or DEFAULT_URL).rstrip("/")
        key = api_key or os.environ.get(KEY_ENVIRONMENT)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, verify=verify)

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, config: Mapping[str, Any], *, idempotency_key: str | None = None) -> Json:
        """Submit a job and return it. A lost answer is asked for again, so that there is one job."""
        key = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._repeat("POST", "/v1/jobs", json=dict(config), headers=key)

    def check(self, config: Mapping[str, Any]) -> None:
        """Have a configuration checked; raises MilesError with every fault."""
        self._send("POST", "/v1/jobs", json=dict(config), params={"dry_run": True})

    def jobs(self, states: Sequence[str] = (), *, page_size: int = 100) -> Iterator[Json]:
        """Jobs, newest first."""
        yield from self._pages("/v1/jobs", "jobs", {"state": list(states), "limit": page_size})

    def job(self, job_id: str) -> Json:
        """One job."""
        return self._get(f"/v1/jobs/{job_id}")

    def pause(self, job_id: str) -> Json:
        """Hold a job."""
        return self.act(job_id, "pause")

    def resume(self, job_id: str) -> Json:
        """Let a job go on that was paused, stopped or failed."""
        return self.act(job_id, "resume")

    def stop(self, job_id: str) -> Json:
        """Save a job and end it."""
        return self.act(job_id, "stop")

    def cancel(self, job_id: str) -> Json:
        """End a job without saving."""
        return self.act(job_id, "cancel")

    def checkpoint(self, job_id: str) -> Json:
        """Save a job and go on."""
        return self.act(job_id, "checkpoint")

    def act(self, job_id: str, action: str) -> Json:
        """Have an action taken up: pause, resume, stop, cancel or checkpoint."""
        key = {"Idempotency-Key": uuid.uuid4().hex}
        return self._repeat("POST", f"/v1/jobs/{job_id}/{action}", headers=key)

    def watch(self, job_id: str, *, after: str | None = None, follow: bool = True) -> Iterator[Json]:
        """A job's events until it has ended; goes on after the last one seen when the connection breaks."""
        last, failures = after, 0
        while True:
            try:
                for event, data, event_id in self._stream(job_id, last, follow):
                    failures = 0
                    if event == "end":
                        return
                    last = event_id
                    yield json.loads(data)
                if not follow:
                    return
            except (GatewayUnreachableError, MilesError) as error:
                away = not isinstance(error, MilesError) or error.kind in _PASSING
                failures += 1
                if not away or failures > _WATCH_RETRIES:
                    raise
                time.sleep(_RETRY_S)

    def metrics(
        self, job_id: str, names: Sequence[str] = (), *, start: int = 0, end: int | None = None, step: int = 1
    ) -> Json:
        """Series of metrics over training steps; a name may end in `*`."""
        wanted: Json = {"name": list(names), "start": start, "step": step}
        return self._get(f"/v1/jobs/{job_id}/metrics", wanted | ({} if end is None else {"end": end}))

    def timeline(self, job_id: str, *, after_unix_s: float = 0.0, limit: int = 1000) -> list[Json]:
        """Which activity went on when."""
        answer = self._get(f"/v1/jobs/{job_id}/timeline", {"after_unix_s": after_unix_s, "limit": limit})
        return list(answer["spans"])

    def samples(
        self,
        job_id: str,
        *,
        step: int | None = None,
        min_reward: float | None = None,
        max_reward: float | None = None,
        page_size: int = 100,
    ) -> Iterator[Json]:
        """Samples that were trained on, newest step first."""
        filters = {"step": step, "min_reward": min_reward, "max_reward": max_reward}
        wanted = {"limit": page_size, **{name: value for name, value in filters.items() if value is not None}}
        yield from self._pages(f"/v1/jobs/{job_id}/samples", "samples", wanted)

    def sample(self, job_id: str, step: int, group_id: int, index: int) -> Json:
        """One sample with what is known of each token of its response."""
        return self._get(f"/v1/jobs/{job_id}/samples/{step}/{group_id}/{index}")

    def status(self, job_id: str) -> Json:
        """What a job's run and workers do or wait for now, and which groups are where."""
        return self._get(f"/v1/jobs/{job_id}/status")

    def checkpoints(self, job_id: str) -> list[Json]:
        """Checkpoints, newest first."""
        return list(self._get(f"/v1/jobs/{job_id}/checkpoints")["checkpoints"])

    def download(self, job_id: str, step: int, path: str | os.PathLike[str]) -> int:
        """Write the Hugging Face export of a step to a file, as a tar archive; returns its size in bytes."""
        written = 0
        target = pathlib.Path(path)
        partial = target.with_name(target.name + ".part")
        with self._open(f"/v1/jobs/{job_id}/checkpoints/{step}/download") as answer, partial.open("wb") as file:
            for piece in answer.iter_bytes(1 << 20):
                written += file.write(piece)
        partial.replace(target)
        return written

    def workers(self, job_id: str | None = None) -> list[Json]:
        """All workers, or those that serve a job."""
        return list(self._get(f"/v1/jobs/{job_id}/workers" if job_id else "/v1/workers")["workers"])

    def versions(self, job_id: str) -> Json:
        """Versions of a job's weights, and the engines that hold them."""
        return self._get(f"/v1/jobs/{job_id}/versions")

    def check_versions(self, job_id: str) -> Json:
        """Have engines compare what they serve with what the trainer sent."""
        return self._repeat("POST", f"/v1/jobs/{job_id}/versions/check")

    def logs(self, job_id: str) -> list[Json]:
        """Log files of the services."""
        return list(self._get(f"/v1/jobs/{job_id}/logs")["logs"])

    def read_log(self, job_id: str, name: str, *, offset: int | None = None, limit: int = 64 << 10) -> Json:
        """A piece of a log: its end, or from an offset on."""
        wanted = {"limit": limit} | ({} if offset is None else {"offset": offset})
        return self._get(f"/v1/jobs/{job_id}/logs/{name}", wanted)

    def _pages(self, path: str, field: str, wanted: Mapping[str, Any]) -> Iterator[Json]:
        cursor: str | None = ""
        while cursor is not None:
            page = self._get(path, {**wanted, "cursor": cursor})
            yield from page[field]
            cursor = page["next_cursor"]

    def _get(self, path: str, params: Mapping[str, Any] | None = None) -> Json:
        return self._repeat("GET", path, params=params)

    def _repeat(self, method: str, path: str, **options: Any) -> Json:
        """Send a request that may be sent twice; the controller may be away for a moment."""
        for attempt in range(_RETRIES):
            try:
                return _decoded(self._send(method, path, **options))
            except MilesError as error:
                if error.kind not in _PASSING or attempt == _RETRIES - 1:
                    raise
                time.sleep(_RETRY_S)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        _check(answer)
        return answer

    def _stream(self, job_id: str, after: str | None, follow: bool) -> Iterator[tuple[str, str, str]]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        with self._open(f"/v1/jobs/{job_id}/events", headers=headers, params={"follow": follow}) as answer:
            for event in parse_events(answer.iter_lines()):
                yield event.event, event.data, event.id

    @contextlib.contextmanager
    def _open(self, path: str, **options: Any) -> Iterator[httpx.Response]:
        """A response to be read piece by piece."""
        timeout = httpx.Timeout(_SILENCE_S, connect=self._http.timeout.connect)
        try:
            with self._http.stream("GET", path, timeout=timeout, **options) as answer:
                if answer.is_error:
                    answer.read()
                _check(answer)
                yield answer
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.TransportError) -> GatewayUnreachableError:
        reason = str(error) or type(error).__name__
        return GatewayUnreachableError(
            f"no gateway answers at {self.url} ({reason}); check the address (--url or ${URL_ENVIRONMENT})"
        )


def _check(answer: httpx.Response) -> None:
    """Raise the problem that an answer is, if it is one."""
    if not answer.is_error:
        return
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict) or "type" not in problem:
        raise UnexpectedAnswerError(f"{answer.url} answered {answer.status_code}, and not as a gateway does")
    raise MilesError(problem)


def _decoded(answer: httpx.Response) -> Json:
    try:
        decoded = answer.json()
    except ValueError:
        decoded = None
    if not isinstance(decoded, dict):
        raise UnexpectedAnswerError(f"{answer.url} answered with something other than a JSON object")
    return decoded

"""Client of a gateway: one method per operation of the REST API."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from miles.addresses import is_loopback
from miles.certificates import why_not_authorities
from miles.client.errors import GatewayUnreachableError, MilesError, UnexpectedAnswerError
from miles.client.events import parse_events
from miles.telemetry.redaction import redact

DEFAULT_URL = "http://127.0.0.1:8000"
URL_ENVIRONMENT, KEY_ENVIRONMENT = "MILES_URL", "MILES_API_KEY"
_SILENCE_S = 60.0
"""How long an event stream may be silent; the gateway sends a comment every 15 s."""
_RETRY_S = 1.0
_RETRIES = 5
"""How often a request is sent while the controller is unreachable."""
_TRANSIENT = frozenset({"controller-away", "too-many-requests", "too-many-watchers"})
"""Problems that pass by themselves."""
_WATCH_RETRIES = 30
"""How often a watcher reconnects without getting an event."""

_REMEDY = f"check the address (--url or ${URL_ENVIRONMENT}): another server is there"

Json = dict[str, Any]


class MilesClient:
    """One gateway. Use as a context manager, or call `close`.

    Every method raises MilesError when the gateway refuses the request, GatewayUnreachableError when nothing answers,
    and UnexpectedAnswerError when the answer is not a gateway's. Return values are those of the OpenAPI document.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        verify: bool | str = True,
    ) -> None:
        """`url` and `api_key` default to $MILES_URL and $MILES_API_KEY; `verify` may be a file of CA certificates.

        Raises ValueError for an address, key or file that cannot be one.
        """
        self.url = (url or os.environ.get(URL_ENVIRONMENT) or DEFAULT_URL).rstrip("/")
        _check_address(self.url)
        key = (api_key or os.environ.get(KEY_ENVIRONMENT) or "").strip()
        if not re.fullmatch(r"[!-~]*", key):  # it would be shown in the error of the HTTP library
            raise ValueError(f"the API key is not one line of ASCII; check --key-file or ${KEY_ENVIRONMENT}")
        if isinstance(verify, str) and (problem := why_not_authorities(verify)) is not None:
            raise ValueError(f"--ca: {problem}")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A proxy of the environment is for the way out of this machine.
        local = is_loopback(urllib.parse.urlsplit(self.url).hostname or "")
        try:
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout_s, verify=verify, trust_env=not local
            )
        except (ImportError, ValueError) as error:
            raise GatewayUnreachableError(f"the proxy of the environment cannot be used: {error}") from error

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
        """Submit a job and return it. Retries use the same idempotency key, so there is one job."""
        key = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._repeat("POST", "/v1/jobs", json=dict(config), headers=key)

    def check(self, config: Mapping[str, Any]) -> None:
        """Check a configuration without submitting it. Raises MilesError with every fault."""
        self._send("POST", "/v1/jobs", json=dict(config), params={"dry_run": True})

    def jobs(self, states: Sequence[str] = (), *, page_size: int = 100) -> Iterator[Json]:
        """Yield jobs, newest first."""
        yield from self._pages("/v1/jobs", "jobs", {"state": list(states), "limit": page_size})

    def job(self, job_id: str) -> Json:
        """Return one job."""
        return self._get(f"/v1/jobs/{job_id}")

    def pause(self, job_id: str) -> Json:
        """Pause a job."""
        return self.act(job_id, "pause")

    def resume(self, job_id: str) -> Json:
        """Resume a job that was paused, was stopped or has failed."""
        return self.act(job_id, "resume")

    def stop(self, job_id: str) -> Json:
        """Save a checkpoint and end the job."""
        return self.act(job_id, "stop")

    def cancel(self, job_id: str) -> Json:
        """End a job without saving."""
        return self.act(job_id, "cancel")

    def checkpoint(self, job_id: str) -> Json:
        """Save a checkpoint and continue."""
        return self.act(job_id, "checkpoint")

    def act(self, job_id: str, action: str) -> Json:
        """Request an action: pause, resume, stop, cancel or checkpoint."""
        key = {"Idempotency-Key": uuid.uuid4().hex}
        return self._repeat("POST", f"/v1/jobs/{job_id}/{action}", headers=key)

    def watch(self, job_id: str, *, after: str | None = None, follow: bool = True) -> Iterator[Json]:
        """Yield a job's events until it has ended; after a lost connection, continue after the last one seen."""
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
                transient = not isinstance(error, MilesError) or error.kind in _TRANSIENT
                failures += 1
                if not transient or failures > _WATCH_RETRIES:
                    raise
                time.sleep(_RETRY_S)

    def metrics(
        self, job_id: str, names: Sequence[str] = (), *, start: int = 0, end: int | None = None, step: int = 1
    ) -> Json:
        """Return per-step metrics; a name may end in `*`."""
        wanted: Json = {"name": list(names), "start": start, "step": step}
        return self._get(f"/v1/jobs/{job_id}/metrics", wanted | ({} if end is None else {"end": end}))

    def timeline(self, job_id: str, *, after_unix_s: float = 0.0, limit: int = 1000) -> list[Json]:
        """Return the activities of the run and its workers over time."""
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
        """Yield samples that were trained on, newest step first."""
        filters = {"step": step, "min_reward": min_reward, "max_reward": max_reward}
        wanted = {"limit": page_size, **{name: value for name, value in filters.items() if value is not None}}
        yield from self._pages(f"/v1/jobs/{job_id}/samples", "samples", wanted)

    def sample(self, job_id: str, step: int, group_id: int, index: int) -> Json:
        """Return one sample with per-token values of its response."""
        return self._get(f"/v1/jobs/{job_id}/samples/{step}/{group_id}/{index}")

    def status(self, job_id: str) -> Json:
        """Return the current activity of a job's run and workers, what they wait for, and the state of its groups."""
        return self._get(f"/v1/jobs/{job_id}/status")

    def checkpoints(self, job_id: str) -> list[Json]:
        """Return checkpoints, newest first."""
        return list(self._get(f"/v1/jobs/{job_id}/checkpoints")["checkpoints"])

    def download(self, job_id: str, step: int, path: str | os.PathLike[str]) -> int:
        """Download the Hugging Face export of a step as a tar archive; return its size in bytes."""
        written = 0
        target = pathlib.Path(path)
        partial = target.with_name(target.name + ".part")
        with self._open(f"/v1/jobs/{job_id}/checkpoints/{step}/download") as answer, partial.open("wb") as file:
            for piece in answer.iter_bytes(1 << 20):
                written += file.write(piece)
        partial.replace(target)
        return written

    def workers(self, job_id: str | None = None) -> list[Json]:
        """Return all workers, or those that serve a job."""
        return list(self._get(f"/v1/jobs/{job_id}/workers" if job_id else "/v1/workers")["workers"])

    def versions(self, job_id: str) -> Json:
        """Return the versions of a job's weights, and the version that each engine holds."""
        return self._get(f"/v1/jobs/{job_id}/versions")

    def check_versions(self, job_id: str) -> Json:
        """Make every engine compare its weights with those that the trainer sent."""
        return self._repeat("POST", f"/v1/jobs/{job_id}/versions/check")

    def logs(self, job_id: str) -> list[Json]:
        """Return the log files of the services."""
        return list(self._get(f"/v1/jobs/{job_id}/logs")["logs"])

    def read_log(self, job_id: str, name: str, *, offset: int | None = None, limit: int = 64 << 10) -> Json:
        """Return part of a log: its end, or from an offset on."""
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
        """Send an idempotent request; retry while the controller is unreachable."""
        for attempt in range(_RETRIES):
            try:
                return _json_object(self._send(method, path, **options))
            except MilesError as error:
                if error.kind not in _TRANSIENT or attempt == _RETRIES - 1:
                    raise
                time.sleep(_RETRY_S)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self._transport_errors():
            answer = self._http.request(method, path, **options)
        _check(answer)
        return answer

    def _stream(self, job_id: str, after: str | None, follow: bool) -> Iterator[tuple[str, str, str]]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        with self._open(f"/v1/jobs/{job_id}/events", headers=headers, params={"follow": follow}) as answer:
            for event in parse_events(answer.iter_lines()):
                yield event.event, event.data, event.id

    @contextlib.contextmanager
    def _open(self, path: str, **options: Any) -> Iterator[httpx.Response]:
        """Open a response that is read piece by piece."""
        timeout = httpx.Timeout(_SILENCE_S, connect=self._http.timeout.connect)
        with self._transport_errors(), self._http.stream("GET", path, timeout=timeout, **options) as answer:
            if answer.is_error:
                answer.read()
            _check(answer)
            yield answer

    @contextlib.contextmanager
    def _transport_errors(self) -> Iterator[None]:
        """Raise errors of the connection as GatewayUnreachableError."""
        try:
            yield
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise GatewayUnreachableError(
                f"no gateway answers at {redact(self.url)} ({reason}); check the address (--url or ${URL_ENVIRONMENT})"
            ) from error


def _check_address(url: str) -> None:
    """Raise ValueError for what is no address of an HTTP server."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{redact(url)} is no address ({error}); write it like {DEFAULT_URL}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{redact(url)} is no address of a gateway; write it like {DEFAULT_URL}")


def _check(answer: httpx.Response) -> None:
    """Raise MilesError when the answer is a problem document."""
    if not answer.is_error:
        return
    problem = _json(answer)
    if not isinstance(problem, dict) or "type" not in problem:
        raise UnexpectedAnswerError(f"{answer.url} answered {answer.status_code}, but not as a gateway does; {_REMEDY}")
    raise MilesError(problem)


def _json(answer: httpx.Response) -> Any:
    """Decode an answer; None when it is not JSON."""
    with contextlib.suppress(ValueError):
        return answer.json()
    return None


def _json_object(answer: httpx.Response) -> Json:
    decoded = _json(answer)
    if not isinstance(decoded, dict):
        raise UnexpectedAnswerError(f"{answer.url} answered with something other than a JSON object; {_REMEDY}")
    return decoded

"""The REST API as a soak uses it: every answer is checked against what is documented for the moment."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from soak.records import Records

TIMEOUT_S = 90.0
DEADLINE_S = 9.0
"""The gateway gives the controller 10 s; an answer that took so long came from a machine that is too busy."""
REFUSALS = frozenset({404, 409, 422})
"""Codes that a request may ask for by what it asks."""


class Away(Exception):
    """The gateway or the controller is away, as the soak has made it."""


class Rest:
    """Sends requests. `troubled(name)` says whether a service is, or has just been, killed or frozen."""

    def __init__(self, url: str, records: Records, troubled: Callable[[str], bool]) -> None:
        self.answers: Counter[str] = Counter()
        """How often each code came."""
        self._records = records
        self._troubled = troubled
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S)

    def get(self, path: str, **params: Any) -> Any:
        """Body of a GET, which must succeed. Raises Away."""
        return self.send("GET", path, frozenset(), params=params)[1]

    def text(self, path: str, **params: Any) -> str:
        """The same without parsing it as JSON."""
        return self._answer("GET", path, frozenset(), params=params).text

    def send(self, method: str, path: str, allowed: frozenset[int], **options: Any) -> tuple[int, Any]:
        """Code and body of a request that may be refused with the allowed codes. Raises Away."""
        answer = self._answer(method, path, allowed, **options)
        if not answer.content:
            return answer.status_code, None
        try:
            return answer.status_code, json.loads(answer.content, parse_constant=_no_constant)
        except ValueError as error:
            self._records.violation("rest", f"{method} {path} answered {answer.status_code} with no JSON: {error}")
            raise Away from error

    def _answer(self, method: str, path: str, allowed: frozenset[int], **options: Any) -> httpx.Response:
        gateway_before, controller_before = self._troubled("gateway"), self._troubled("controller")
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            self.answers[type(error).__name__] += 1
            self._records.refused(method=method, path=path, error=repr(error))
            if not (gateway_before or self._troubled("gateway")):
                self._records.violation("rest", f"{method} {path}: {error!r}, while the gateway was not touched")
            raise Away from error
        code = answer.status_code
        self.answers[str(code)] += 1
        if answer.is_success:
            return answer
        self._records.refused(method=method, path=path, code=code, body=answer.text[:600])
        if code in allowed:
            return answer
        if code == 503 and (
            controller_before or self._troubled("controller") or answer.elapsed.total_seconds() > DEADLINE_S
        ):
            raise Away
        self._records.violation("rest", f"{method} {path} answered {code}: {answer.text[:400]}")
        raise Away


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")

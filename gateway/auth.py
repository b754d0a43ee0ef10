"""Authentication and authorisation of requests."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from miles.addresses import is_loopback
from miles.gateway.keys import KeyFile, Scope
from miles.gateway.options import GatewayOptions
from miles.gateway.problems import Problem
from miles.gateway.rate_limit import RateLimit

_FAILURES_PER_S = 0.2
_FAILURE_BURST = 20
"""Wrong keys that one address may send in a burst; after that, one every five seconds."""

bearer = HTTPBearer(
    auto_error=False,
    scheme_name="ApiKey",
    description="An API key made by `miles keys create`. A gateway that was started without keys serves only its own "
    "machine and asks for none.",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated caller of a request."""

    name: str
    scope: Scope

    def may_change(self, submitted_by: str) -> bool:
        """Return whether the caller may act on a job of this submitter."""
        return self.scope is Scope.ADMIN or (self.scope.includes(Scope.SUBMIT) and submitted_by == self.name)


LOCAL = Caller("local", Scope.ADMIN)
"""The caller from this machine when the gateway has no keys."""


class Gatekeeper:
    """Checks API keys, scopes, rate limits, and without keys the origin of requests."""

    def __init__(self, options: GatewayOptions, now: Callable[[], float] = time.monotonic) -> None:
        self._keys = None if options.keys_file is None else KeyFile(options.keys_file)
        self._now = now
        self._limit = RateLimit(options.requests_per_s, options.burst)
        self._failures = RateLimit(_FAILURES_PER_S, _FAILURE_BURST)

    def admit(self, request: Request, presented: str | None, needed: Scope) -> Caller:
        """Return the caller of a request. Raises Problem when it is refused."""
        caller = self._local(request) if self._keys is None else self._keyed(self._keys, request, presented)
        wait_s = self._limit.take(caller.name, self._now())
        if wait_s > 0:
            raise Problem(
                "too-many-requests",
                f"{caller.name} sends more requests than this gateway allows; wait {wait_s:.2f} s, or follow /events",
                headers={"Retry-After": str(max(1, round(wait_s)))},
            )
        if not caller.scope.includes(needed):
            raise Problem(
                "missing-scope",
                f"key {caller.name!r} has scope {caller.scope}, and this needs {needed}; "
                f"make one with `miles keys create --scope {needed}`",
                headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{needed}"'},
            )
        return caller

    def _keyed(self, keys: KeyFile, request: Request, presented: str | None) -> Caller:
        if presented is None:
            raise Problem(
                "missing-key",
                "send the header `Authorization: Bearer KEY`; `miles keys create` makes a key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        key = keys.verify(presented)
        if key is None:
            address = request.client.host if request.client else ""
            wait_s = self._failures.take(address, self._now())
            if wait_s > 0:
                raise Problem(
                    "too-many-requests",
                    f"too many wrong keys from {address}; wait {wait_s:.0f} s",
                    headers={"Retry-After": str(max(1, round(wait_s)))},
                )
            raise Problem(
                "unknown-key",
                "the key is wrong, was revoked, or has expired; `miles keys list` shows which keys there are",
                headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
            )
        return Caller(key.name, key.scope)

    def _local(self, request: Request) -> Caller:
        """Accept requests from this machine only, and none that a browser sends for a page of another site."""
        address = request.client.host if request.client else ""
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != host
        cross_site = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if not is_loopback(address) or not is_loopback(_host_name(host)) or foreign or cross_site:
            raise Problem(
                "not-local",
                "this gateway has no API keys and serves only its own machine, under the name localhost; start it with "
                "--keys-file to serve others",
            )
        return LOCAL


def _host_name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host


Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]


def _admit(request: Request, credentials: HTTPAuthorizationCredentials | None, needed: Scope) -> Caller:
    gatekeeper: Gatekeeper = request.app.state.gatekeeper
    caller = gatekeeper.admit(request, credentials.credentials if credentials else None, needed)
    request.state.caller = caller.name
    return caller


async def _reader(request: Request, credentials: Credentials) -> Caller:
    return _admit(request, credentials, Scope.READ)


async def _submitter(request: Request, credentials: Credentials) -> Caller:
    return _admit(request, credentials, Scope.SUBMIT)


Reader = Annotated[Caller, Security(_reader)]
"""A caller who may see everything."""
Submitter = Annotated[Caller, Security(_submitter)]
"""A caller who may submit jobs."""

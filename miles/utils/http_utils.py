"""HTTP requests of functions of users, to the engine or to tools."""

from __future__ import annotations

import asyncio
import json
import logging
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

_sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession] = weakref.WeakKeyDictionary()


class RequestRefused(RuntimeError):
    """A server refused a request, which repeating it would not change."""


async def post(
    url: str, payload: Mapping[str, Any] | None, max_retries: int = 60, headers: Mapping[str, str] | None = None
) -> Any:
    """Send JSON and return the JSON (or text) of the answer; a server that fails is asked again, once a second.

    Raises RequestRefused with the server's words when it says that the request is wrong (400 to 499).
    """
    import aiohttp  # here, as processes that only score load this module too, with a function's own

    for attempt in range(1, max_retries + 1):
        try:
            async with _session().post(url, json=dict(payload or {}), headers=headers) as response:
                text = await response.text()
                if 400 <= response.status < 500:
                    raise RequestRefused(f"{_shown(url)} refused the request ({response.status}): {text[:2000]}")
                response.raise_for_status()
                return _json_or_text(text)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            if attempt == max_retries:
                raise
            log.info("%s: %s; attempt %d of %d", _shown(url), error, attempt, max_retries)
            await asyncio.sleep(1.0)
    raise ValueError(f"max_retries is {max_retries}; it must be at least 1")


async def get(url: str) -> Any:
    """Return the JSON (or text) at an address."""
    async with _session().get(url) as response:
        response.raise_for_status()
        return _json_or_text(await response.text())


def _session() -> aiohttp.ClientSession:
    """Return the connections of this event loop; proxies of the environment are not used."""
    import aiohttp

    loop = asyncio.get_running_loop()
    session = _sessions.get(loop)
    if session is None or session.closed:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        _sessions[loop] = session
    return session


async def close_session() -> None:
    """Close the connections of this event loop."""
    session = _sessions.pop(asyncio.get_running_loop(), None)
    if session is not None:
        await session.close()


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _shown(url: str) -> str:
    """The address without user and password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"

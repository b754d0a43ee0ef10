"""HTTP connections with limits on unfinished requests, and problem documents for malformed HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from miles.gateway.problems import MEDIA_TYPE

HEAD_S = 20.0
"""Time from connecting, or from the first byte of a request, to the end of its headers, in seconds."""
HEAD_BYTES = 64 << 10
"""Maximum size of request line and headers."""


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, with limits: anybody can connect, so unfinished requests must not hold resources."""

    head_s = HEAD_S

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes = 0
        self._in_head = True
        self._begun = False
        """Whether the first byte of a request has arrived."""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.head_s, self._time_out)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES + len(data):  # earlier data belongs to an unfinished head
                self._refuse(431, "Request Header Fields Too Large", f"at most {HEAD_BYTES} bytes are accepted")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._begun, self._in_head, self._head_bytes = True, True, 0
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self._time_out)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "Bad Request", "the request is not HTTP/1.1")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._begun:
            self._refuse(408, "Request Timeout", f"the request's headers did not come within {self.head_s:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, title: str, detail: str) -> None:
        """Answer and close the connection; there is no request yet for the application."""
        body = json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail}).encode()
        head = (
            f"HTTP/1.1 {status} {title}\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n"
            "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

"""Tells a controller that does not answer yet from one that never will, and names the cause."""

from __future__ import annotations

import asyncio
import re

import grpc
import grpc.aio

from miles.addresses import split_address
from miles.certificates import speaks_tls
from miles.rpc.exit_codes import ExitCode, ServiceExit
from miles.rpc.tls import CA, MUTUAL, TlsFiles

_CLOSED_AT_MOST = 5
"""Connections in a row that the other side may close at once; one that is killed closes one."""


class Refusals:
    """Judges the errors of one address until the first call has succeeded."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._closed = 0
        self._tls = TlsFiles.from_environment() is not None

    async def judge(self, error: grpc.aio.AioRpcError) -> None:
        """Raise ServiceExit when waiting cannot mend the cause of an error."""
        details = error.details() or ""
        self._closed = self._closed + 1 if "Socket closed" in details else 0
        if (found := cause(error.code(), details)) is not None:
            raise self._exit(*found) from error
        if self._closed == 2 and not self._tls and await asyncio.to_thread(speaks_tls, *split_address(self._address)):
            raise self._exit(ExitCode.TLS_FAILED, f"it wants TLS; set {CA}") from error
        if self._closed >= _CLOSED_AT_MOST and self._tls:
            problem = f"it closes every connection; it may want a certificate of its authority ({MUTUAL}=1)"
            raise self._exit(ExitCode.TLS_FAILED, problem) from error

    def _exit(self, code: ExitCode, problem: str) -> ServiceExit:
        return ServiceExit(code, f"the controller at {self._address} cannot be used: {problem}")


def cause(code: grpc.StatusCode, details: str) -> tuple[ExitCode, str] | None:
    """Return exit code and description of a cause that waiting cannot mend; None for any other."""
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ExitCode.NOT_A_CONTROLLER, "another gRPC service listens there"
    if "Failed parsing HTTP/2" in details or "http1.x server" in details:
        return ExitCode.NOT_A_CONTROLLER, "what listens there speaks no gRPC"
    if "Hostname Verification Check failed" in details:
        return ExitCode.TLS_FAILED, "its certificate is of another name; see MILES_TLS_SERVER_NAME"
    if "WRONG_VERSION_NUMBER" in details:
        return ExitCode.TLS_FAILED, "it does not speak TLS; leave the MILES_TLS_ variables out, or set its own"
    if "Tls handshake failed" in details and "SSL_ERROR_SSL" in details:
        reason = re.search(r"OPENSSL_internal:(.*?)(?:: OK|$)", details)
        return ExitCode.TLS_FAILED, f"the TLS handshake fails ({reason[1] if reason else details})"
    if "Domain name not found" in details:
        return ExitCode.CONTROLLER_UNREACHABLE, "there is no such host"
    return None

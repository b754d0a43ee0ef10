"""TLS for gRPC from files named by environment variables, the same for every server and client of a process.

MILES_TLS_CERT and MILES_TLS_KEY are the certificate chain and private key of servers, and with MILES_TLS_MUTUAL=1 of
clients too; MILES_TLS_CA has the trusted CA certificates; MILES_TLS_SERVER_NAME is the name to expect in servers'
certificates instead of the address connected to. With none of the first three, connections are not encrypted.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import grpc

from miles.certificates import why_not_authorities, why_not_pair
from miles.rpc.exit_codes import ExitCode, ServiceExit

CERT, KEY, CA = "MILES_TLS_CERT", "MILES_TLS_KEY", "MILES_TLS_CA"
MUTUAL, SERVER_NAME = "MILES_TLS_MUTUAL", "MILES_TLS_SERVER_NAME"


@dataclasses.dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files of certificates and keys. Built by `from_environment`; read when credentials are made."""

    cert: str | None
    key: str | None
    ca: str | None
    mutual: bool = False
    server_name: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> TlsFiles | None:
        """Read the environment; return None when connections are not encrypted. Raises ServiceExit."""
        values = os.environ if environment is None else environment
        cert, key, ca = (values.get(name) or None for name in (CERT, KEY, CA))
        if cert is None and key is None and ca is None:
            return None
        mutual = values.get(MUTUAL, "") not in ("", "0")
        if (cert is None) != (key is None):
            raise ServiceExit(ExitCode.BAD_CONFIG, f"{CERT} and {KEY} go together: set both, or neither")
        if mutual and (cert is None or ca is None):
            raise ServiceExit(ExitCode.BAD_CONFIG, f"{MUTUAL}=1 needs {CERT}, {KEY} and {CA}")
        return cls(cert, key, ca, mutual, values.get(SERVER_NAME) or None)

    def to_environment(self) -> dict[str, str]:
        """Return the environment variables for these files."""
        named = {CERT: self.cert, KEY: self.key, CA: self.ca, SERVER_NAME: self.server_name}
        return {name: value for name, value in named.items() if value} | ({MUTUAL: "1"} if self.mutual else {})

    def server_credentials(self) -> grpc.ServerCredentials:
        """Build a server's credentials. Raises ServiceExit when there is no certificate or it cannot be read."""
        if self.cert is None or self.key is None:
            raise ServiceExit(ExitCode.BAD_CONFIG, f"{CA} alone is enough for clients; a server needs {CERT} and {KEY}")
        pair = _read_pair(self.cert, self.key)
        authorities = self._authorities() if self.mutual else None
        return grpc.ssl_server_credentials([pair], authorities, require_client_auth=self.mutual)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Build a client's credentials. Raises ServiceExit when a file cannot be read."""
        authorities = self._authorities()
        if not self.mutual or self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(authorities)
        return grpc.ssl_channel_credentials(authorities, *_read_pair(self.cert, self.key))

    def _authorities(self) -> bytes | None:
        if self.ca is None:
            return None
        if (problem := why_not_authorities(self.ca)) is not None:
            raise ServiceExit(ExitCode.BAD_CONFIG, f"{CA}: {problem}")
        return pathlib.Path(self.ca).read_bytes()

    def channel_options(self) -> list[tuple[str, str]]:
        """Return the options of a client's channel."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def _read_pair(cert: str, key: str) -> tuple[bytes, bytes]:
    """Return the contents of the key and of its certificate."""
    if (problem := why_not_pair(cert, key)) is not None:
        raise ServiceExit(ExitCode.BAD_CONFIG, f"{CERT}, {KEY}: {problem}")
    return pathlib.Path(key).read_bytes(), pathlib.Path(cert).read_bytes()

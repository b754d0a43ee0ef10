"""TLS for gRPC, from files that environment variables name: the same for every service and client of a process.

MILES_TLS_CERT and MILES_TLS_KEY are the chain and key that servers show, and clients too with MILES_TLS_MUTUAL=1;
MILES_TLS_CA holds the authorities to trust; MILES_TLS_SERVER_NAME is the name to expect in servers' certificates in
place of the address that was connected to. With none of the first three, connections are not encrypted.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import grpc

from miles.rpc.exit_codes import ExitCode, ServiceExit

CERT, KEY, CA = "MILES_TLS_CERT", "MILES_TLS_KEY", "MILES_TLS_CA"
MUTUAL, SERVER_NAME = "MILES_TLS_MUTUAL", "MILES_TLS_SERVER_NAME"


@dataclasses.dataclass(frozen=True, slots=True)
class TlsFiles:
    """What to encrypt with. Built by `from_environment`; files are read when credentials are made."""

    cert: str | None
    key: str | None
    ca: str | None
    mutual: bool = False
    server_name: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> TlsFiles | None:
        """The files that the environment names, or None when connections are not encrypted. Raises ServiceExit."""
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
        """The variables that say this."""
        named = {CERT: self.cert, KEY: self.key, CA: self.ca, SERVER_NAME: self.server_name}
        return {name: value for name, value in named.items() if value} | ({MUTUAL: "1"} if self.mutual else {})

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server. Raises ServiceExit when there is no certificate or it cannot be read."""
        if self.cert is None or self.key is None:
            raise ServiceExit(ExitCode.BAD_CONFIG, f"{CA} alone does for clients; a server needs {CERT} and {KEY}")
        pair = (_read(KEY, self.key), _read(CERT, self.cert))
        authorities = _read(CA, self.ca) if self.mutual and self.ca else None
        return grpc.ssl_server_credentials([pair], authorities, require_client_auth=self.mutual)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client. Raises ServiceExit when a file cannot be read."""
        authorities = _read(CA, self.ca) if self.ca else None
        if not self.mutual or self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(authorities)
        return grpc.ssl_channel_credentials(authorities, _read(KEY, self.key), _read(CERT, self.cert))

    def channel_options(self) -> list[tuple[str, str]]:
        """Options of a client's channel."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def _read(variable: str, path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ServiceExit(ExitCode.BAD_CONFIG, f"{variable}={path} cannot be read: {error.strerror}") from error

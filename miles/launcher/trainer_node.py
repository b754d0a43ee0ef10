"""`miles trainer-node`: the trainer's ranks on a node other than the first, kept running until the trainer ends."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

from miles.addresses import address_argument
from miles.cores import THREADS_VARIABLE, share_of, usable_cores
from miles.keepalive import probe_peer
from miles.launcher.inherited import QUIET_ENVIRONMENT, inherited
from miles.launcher.process import describe
from miles.launcher.restart_policy import RestartPolicy
from miles.launcher.torchrun import Node, master_of, torchrun
from miles.rpc import WorkerAttachment
from miles.rpc import main as run_service
from miles.rpc.gen import controller_pb2
from miles.rpc.server import WATCHED_PID_ENVIRONMENT
from miles.tasks import cancelled_at_end

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Time between two attempts to reach node 0."""
_CONNECT_S = 3.0
_SAY_EVERY_S = 30.0
_END_S = 5.0
"""How long the ranks of this node may take to end by themselves after those of node 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep the ranks running until the trainer ends in order, or this program is stopped; return the exit code."""
    options, trainer_flags = _parser().parse_known_args(arguments)
    node = Node(options.node_rank, options.nodes, options.ranks_per_node, options.master)
    keeper = NodeKeeper(node, options.controller, options.worker_id, options.rank_timeout_s, trainer_flags)
    run_service(keeper.serve)
    return 0


class NodeKeeper:
    """Starts torchrun on this node whenever node 0 waits for it, and ends it when node 0 is gone."""

    def __init__(
        self, node: Node, controller: str, worker_id: str, silence_s: float, trainer_flags: Sequence[str] = ()
    ) -> None:
        """`silence_s`: how long node 0 may not be reached, in seconds. `trainer_flags` go to the trainer's ranks."""
        self._node = node
        self._controller = controller
        self._worker_id = worker_id
        self._silence_s = silence_s
        flags = ("--controller", controller, "--worker-id", worker_id, "--rank-timeout-s", f"{silence_s:g}")
        self._folder = tempfile.TemporaryDirectory(prefix="miles-trainer-node-")
        self._ended = pathlib.Path(self._folder.name) / "ended"
        """A file that the ranks write when the trainer ends in order. torchrun's exit code may come much later."""
        self._command = torchrun(
            node, ("-m", "miles.services.trainer", *flags, "--ended-file", str(self._ended), *trainer_flags)
        )
        self._policy = RestartPolicy(limit=sys.maxsize)
        self._activity = "starting"
        self._running = False
        self._beats = 0
        """Heartbeats while the ranks ran: they are this node's progress."""

    async def serve(self) -> None:
        """Run until the ranks end in order; raises what ends it for good."""
        node = self._node
        attachment = WorkerAttachment(
            self._controller,
            worker_id=f"{self._worker_id}-node-{node.rank}",
            kind=controller_pb2.WORKER_KIND_TRAINER_NODE,
            address="0.0.0.0:0",  # nobody calls it; others are told this host's address
            heartbeat=self._heartbeat,
            info={"trainer": self._worker_id, "node": node.rank, "nodes": node.count, "ranks": node.ranks},
        )
        attached = asyncio.create_task(attachment.run(), name="controller attachment")
        keeping = asyncio.create_task(self._keep(), name="ranks")
        async with cancelled_at_end(attached, keeping):
            ended, _ = await asyncio.wait({attached, keeping}, return_when=asyncio.FIRST_COMPLETED)
            for each in ended:
                each.result()

    def _heartbeat(self) -> controller_pb2.WorkerHeartbeat:
        self._beats += self._running
        return controller_pb2.WorkerHeartbeat(activity=self._activity, progress=self._beats)

    async def _keep(self) -> None:
        while True:
            code = await self._run_once()
            if code == 0 or self._ended.exists():
                logger.info("the trainer has ended")
                return
            delay_s = self._policy.delay_after(code, time.monotonic()) or 0.0
            self._say(f"the ranks of node {self._node.rank} ended with {describe(code)}; starting them again")
            await asyncio.sleep(delay_s)

    async def _run_once(self) -> int:
        """Run the ranks once, from the time when node 0 can be reached, and return torchrun's exit code."""
        reader, writer = await self._reach_first_node()
        try:
            logger.info("node %d of %d: %s", self._node.rank, self._node.count, " ".join(self._command))
            self._activity, self._running = f"running {self._node.ranks} ranks", True
            process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment(), stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
            running = asyncio.create_task(process.wait())
            gone = asyncio.create_task(_until_closed(reader))
            try:
                async with cancelled_at_end(gone):
                    await self._until_one_ends(running, gone)
            finally:
                self._running = False
                await _end(process)
            return await running
        finally:
            writer.close()

    async def _until_one_ends(self, running: asyncio.Task[int], gone: asyncio.Task[None]) -> None:
        """Return when the ranks have ended, or have to be ended because node 0 is gone or the trainer has ended."""
        while not (running.done() or gone.done() or self._ended.exists()):
            await asyncio.wait({running, gone}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        end = time.monotonic() + _END_S
        while not (running.done() or self._ended.exists()) and time.monotonic() < end:
            await asyncio.wait({running}, timeout=_LOOK_S / 10)

    async def _reach_first_node(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Wait until node 0 serves the rendezvous; the connection, on which nothing is sent, breaks when it is gone.

        A torchrun that is left from an earlier rendezvous would wait for ranks that have ended.
        """
        host, port = master_of(self._node)
        said_s = -_SAY_EVERY_S
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _CONNECT_S)
                probe_peer(writer.get_extra_info("socket"), self._silence_s)
                return reader, writer
            if time.monotonic() - said_s >= _SAY_EVERY_S:
                self._say(
                    f"waiting for the trainer's node 0 at {self._node.master}: start train.py or miles serve there"
                )
                said_s = time.monotonic()
            await asyncio.sleep(_LOOK_S)

    def _say(self, activity: str) -> None:
        self._activity = activity
        logger.info("%s", activity)

    def _environment(self) -> dict[str, str]:
        threads = {} if THREADS_VARIABLE in os.environ else {THREADS_VARIABLE: str(self._threads)}
        return {**inherited(os.environ), **QUIET_ENVIRONMENT, **threads, WATCHED_PID_ENVIRONMENT: str(os.getpid())}

    @property
    def _threads(self) -> int:
        return share_of(usable_cores(), self._node.ranks)


async def _until_closed(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(1 << 12):
            pass


async def _end(process: asyncio.subprocess.Process) -> None:
    """End torchrun, which ends its ranks; they end by themselves when it is killed."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miles trainer-node",
        description="Runs the trainer's ranks of a node other than the first by torchrun, and starts them again when "
        "they end or node 0 was gone, until the trainer ends. train.py and miles serve print each node's command. "
        "Other flags go to the ranks (python -m miles.services.trainer --help).",
    )
    add = parser.add_argument
    add("--nodes", type=int, required=True, metavar="N", help="nodes of the trainer, the first included")
    add("--node-rank", type=int, required=True, metavar="I", help="which of them this is, from 1 to N - 1")
    add("--ranks-per-node", type=int, required=True, metavar="G", help="ranks on each node, with one GPU each")
    master = "where node 0 serves the rendezvous of the ranks"
    add("--master", type=address_argument, required=True, metavar="HOST:PORT", help=master)
    add("--controller", type=address_argument, required=True, metavar="HOST:PORT", help="the run's controller")
    add("--worker-id", default="trainer-0", help="the trainer's name (default: %(default)s)")
    silence = "how long node 0 may not be reached before the ranks end, in seconds (default: %(default)g)"
    add("--rank-timeout-s", type=float, default=60.0, metavar="SECONDS", help=silence)
    return parser

"""Run the trainer: `python -m miles.services.trainer --help`, under torchrun for more than one process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import pathlib
import select
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from miles.addresses import address_argument, listen_argument
from miles.cores import limit_threads
from miles.rpc import ExitCode, WorkerAttachment, main, start_server
from miles.rpc.address_file import write_address
from miles.rpc.advertise import add_advertise_flag
from miles.tasks import until_end

if TYPE_CHECKING:
    from miles.services.trainer.ranks.collective_calls import Ranks
    from miles.services.trainer.ranks.connections import RankConnections
    from miles.services.trainer.ranks.leader import Leader
    from miles.services.trainer.ranks.worker import RankWorker

_STOP_GRACE_S = 2.0
_LAST_COMMAND_S = 5.0
"""How long a command that runs when the trainer is stopped may take to end."""
_LAST_WORD_S = 3.0
"""How long a rank that has lost the others waits to hear that rank 0 ends in order."""
logger = logging.getLogger(__name__)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; `--help` lists it."""
    parser = argparse.ArgumentParser(
        prog="python -m miles.services.trainer",
        description="Trains one job at a time. Started by torchrun, rank 0 serves and the other ranks follow it.",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:0",
        type=listen_argument,
        metavar="HOST:PORT",
        help="where rank 0 serves; port 0 picks a free one",
    )
    add_advertise_flag(parser)
    parser.add_argument("--controller", type=address_argument, metavar="HOST:PORT", help="controller to register with")
    parser.add_argument("--worker-id", default="trainer", help="name to register under")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="what to compute on")
    parser.add_argument(
        "--distributed-backend", choices=("nccl", "gloo"), help="collectives between ranks (default: by device)"
    )
    parser.add_argument(
        "--distributed-timeout-minutes", type=float, default=10, help="how long a collective may take, in minutes"
    )
    parser.add_argument(
        "--rank-timeout-s",
        type=float,
        default=60,
        help="how long another rank's host may not be reached before this rank ends, in seconds (default: %(default)g)",
    )
    parser.add_argument(
        "--ended-file", type=pathlib.Path, help="ranks other than 0 write this file when the trainer has ended in order"
    )
    parser.add_argument("--address-file", type=pathlib.Path, help="write the host:port served on to this file")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Join the other ranks, then serve (rank 0) or follow."""
    import torch.distributed as dist

    from miles.services.trainer.ranks.collective_calls import Ranks
    from miles.services.trainer.ranks.process_group import join
    from miles.services.trainer.ranks.worker import RankWorker

    if "TORCHELASTIC_RUN_ID" in os.environ:
        _exit_with(os.getppid())
    group = arguments.distributed_backend, arguments.distributed_timeout_minutes
    device, connections = join(arguments.device, *group, arguments.rank_timeout_s, _end_process)
    ranks = Ranks()
    worker = RankWorker(device, ranks.rank, ranks.count, ranks.share, ranks.exchange)
    try:
        if ranks.rank == 0:
            main(lambda: serve(arguments, ranks, worker, connections))
        else:
            _follow(ranks, worker, connections)
            if arguments.ended_file is not None:
                arguments.ended_file.touch()
    finally:
        connections.close(orderly=False)
        dist.destroy_process_group()


def _follow(ranks: Ranks, worker: RankWorker, connections: RankConnections) -> None:
    """Run rank 0's commands until it ends. It says when: torchrun's SIGTERM comes to every rank of a host at once."""
    from miles.services.trainer.ranks.collective_calls import RanksLostError, follow

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        follow(ranks, worker.run)
    except RanksLostError as lost:
        if not connections.ended.wait(_LAST_WORD_S):
            _end_process(str(lost))


def _end_process(reason: str) -> None:
    """End this rank, which cannot go on without another: a collective that waits cannot be interrupted."""
    logger.critical("rank %s ends: %s", os.environ.get("RANK", "0"), reason)
    os._exit(int(ExitCode.WORKER_FAILED))


def _exit_with(launcher_pid: int) -> None:
    """Exit when the launcher of the ranks has exited: nothing is left to stop or restart this rank."""

    def wait() -> None:
        with contextlib.suppress(ProcessLookupError):
            launcher = os.pidfd_open(launcher_pid)
            select.select([launcher], [], [])
        os._exit(int(ExitCode.WORKER_FAILED))

    threading.Thread(target=wait, name="exit with the launcher", daemon=True).start()


async def serve(arguments: argparse.Namespace, ranks: Ranks, worker: RankWorker, connections: RankConnections) -> None:
    """Serve until cancelled; the first line on stdout is `listening on HOST:PORT`."""
    from miles.precision.speed import worker_speed
    from miles.rpc.gen import controller_pb2, trainer_pb2_grpc
    from miles.services.trainer.ranks.leader import Leader
    from miles.services.trainer.service import SERVICE_NAME, TrainerServicer

    speed = await asyncio.to_thread(worker_speed, worker.device.type)
    leader = Leader(ranks, worker, connections.fail)
    servicer = TrainerServicer(leader)
    server, address = await start_server(
        lambda server: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, server),
        arguments.listen,
        [SERVICE_NAME],
    )
    print(f"listening on {address}", flush=True)
    if arguments.address_file is not None:
        write_address(arguments.address_file, address)
    async with contextlib.AsyncExitStack() as stack:
        # Last: even if the checkpoint fails, the other ranks wait.
        stack.push_async_exit(_release_ranks(leader, connections))
        stack.push_async_callback(servicer.close)
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        tasks = [asyncio.create_task(leader.send_heartbeats(), name="heartbeats to the other ranks")]
        if arguments.controller:
            attachment = WorkerAttachment(
                arguments.controller,
                worker_id=arguments.worker_id,
                advertise=arguments.advertise,
                kind=controller_pb2.WORKER_KIND_TRAINER,
                address=address,
                heartbeat=servicer.heartbeat,
                num_gpus=ranks.count if worker.device.type == "cuda" else 0,
                info={"ranks": ranks.count, "device": worker.device.type, **speed},
            )
            tasks.append(asyncio.create_task(attachment.run(), name="controller attachment"))
        for task in tasks:
            stack.callback(task.cancel)
        stack.callback(connections.expect_end)
        await until_end(server.wait_for_termination(), *tasks)


def _release_ranks(leader: Leader, connections: RankConnections) -> Callable[..., Awaitable[None]]:
    """Return what is called at the end of `serve`, with the exception that ended it.

    When it was asked to stop, the other ranks exit too, and this process if a command does not end: torch cannot be
    interrupted. After an error they end as those who have lost a rank, so that they are started again.
    """

    async def release(kind: type[BaseException] | None, *_: object) -> None:
        orderly = kind is None or issubclass(kind, asyncio.CancelledError)
        released = not orderly or await asyncio.to_thread(leader.close, _LAST_COMMAND_S)
        connections.close(orderly=orderly)
        if not released:
            # What the step has done so far would be lost in any case.
            logger.warning("exiting in the middle of a command")
            os._exit(ExitCode.OK)

    return release


if __name__ == "__main__":
    limit_threads()
    run(parse_arguments(sys.argv[1:]))

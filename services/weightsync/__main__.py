"""Run the weightsync service: `python -m miles.services.weightsync --help`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import pathlib
import sys

import grpc.aio

from miles.addresses import address_argument, listen_argument
from miles.rpc import WorkerAttachment, main, start_server
from miles.rpc.advertise import add_advertise_flag
from miles.rpc.gen import controller_pb2, weightsync_pb2_grpc
from miles.services.weightsync.segments import default_directory
from miles.services.weightsync.service import SERVICE_NAME, WeightSyncServicer
from miles.services.weightsync.timing import PublicationLimits
from miles.tasks import until_end

_STOP_GRACE_S = 2.0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; `--help` lists it."""
    parser = argparse.ArgumentParser(
        prog="python -m miles.services.weightsync",
        description="Keeps the versions of the weights and brings every engine to the active one.",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:0",
        type=listen_argument,
        metavar="HOST:PORT",
        help="where to serve; port 0 picks a free one",
    )
    parser.add_argument(
        "--state-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for the state that a restarted service restores; without it, versions are lost with the process",
    )
    parser.add_argument(
        "--directory",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for the weights' bytes, shared with trainers and engines on this host (default: /dev/shm)",
    )
    parser.add_argument(
        "--disk-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="folder on storage shared with trainers and engines, for engines on other hosts (default: none)",
    )
    parser.add_argument(
        "--serving-lease-s",
        type=float,
        default=PublicationLimits().serving_lease_s,
        metavar="SECONDS",
        help="how long an engine may go on serving without hearing from this service (default: %(default)g)",
    )
    parser.add_argument(
        "--keep-bytes",
        action="store_true",
        help="keep the bytes on an orderly stop too, for a restart in the middle of a run; needs --state-dir",
    )
    add_advertise_flag(parser)
    parser.add_argument("--controller", type=address_argument, metavar="HOST:PORT", help="controller to register with")
    parser.add_argument("--worker-id", default="weightsync", help="name to register under")
    options = parser.parse_args(arguments)
    if options.serving_lease_s <= 0:
        parser.error(f"--serving-lease-s {options.serving_lease_s:g} must be greater than 0")
    if options.disk_dir is not None and options.disk_dir == (options.directory or default_directory()):
        parser.error(f"--disk-dir {options.disk_dir} must be another folder than --directory")
    return options


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until cancelled; the first line on stdout is `listening on HOST:PORT`."""
    directory = arguments.directory or default_directory()
    limits = PublicationLimits(serving_lease_s=arguments.serving_lease_s)
    servicer = WeightSyncServicer(
        arguments.state_dir, directory, arguments.keep_bytes, limits, disk_dir=arguments.disk_dir
    )
    servicer.start()

    def register(server: grpc.aio.Server) -> None:
        weightsync_pb2_grpc.add_WeightSyncServiceServicer_to_server(servicer, server)

    server, address = await start_server(register, arguments.listen, [SERVICE_NAME])
    print(f"listening on {address}", flush=True)
    try:
        async with contextlib.AsyncExitStack() as stack:
            tasks: list[asyncio.Task[None]] = []
            if arguments.controller:
                attachment = WorkerAttachment(
                    arguments.controller,
                    worker_id=arguments.worker_id,
                    advertise=arguments.advertise,
                    kind=controller_pb2.WORKER_KIND_WEIGHTSYNC,
                    address=address,
                    heartbeat=servicer.heartbeat,
                )
                task = asyncio.create_task(attachment.run(), name="controller attachment")
                stack.callback(task.cancel)
                tasks.append(task)
            await until_end(server.wait_for_termination(), *tasks)
    finally:
        servicer.end_subscriptions()
        try:
            await server.stop(_STOP_GRACE_S)
        finally:
            servicer.close()


if __name__ == "__main__":
    options = parse_arguments(sys.argv[1:])
    main(lambda: serve(options))

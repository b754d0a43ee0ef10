"""Run the draft trainer: `python -m miles.services.trainer.drafts --help`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import sys

import grpc.aio

from miles.addresses import address_argument, listen_argument
from miles.cores import limit_threads
from miles.rpc import WorkerAttachment, main, start_server
from miles.rpc.advertise import add_advertise_flag
from miles.rpc.gen import controller_pb2, draft_trainer_pb2_grpc
from miles.services.trainer.drafts.loading import device_named, load_job
from miles.services.trainer.drafts.service import SERVICE_NAME, DraftTrainerServicer
from miles.tasks import until_end

_STOP_GRACE_S = 2.0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; `--help` lists it."""
    parser = argparse.ArgumentParser(
        prog="python -m miles.services.trainer.drafts",
        description="Trains the draft model of speculative decoding beside a run, one job at a time.",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:0",
        type=listen_argument,
        metavar="HOST:PORT",
        help="where to serve; port 0 picks a free one",
    )
    add_advertise_flag(parser)
    parser.add_argument("--controller", type=address_argument, metavar="HOST:PORT", help="controller to register with")
    parser.add_argument("--worker-id", default="draft-trainer", help="name to register under")
    parser.add_argument(
        "--device", default="auto", help="what to compute on: cpu, cuda, cuda:N, or auto, which is the last GPU"
    )
    return parser.parse_args(arguments)


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until cancelled; the first line on stdout is `listening on HOST:PORT`."""
    device = device_named(arguments.device)
    servicer = DraftTrainerServicer(functools.partial(load_job, device_name=device))

    def register(server: grpc.aio.Server) -> None:
        draft_trainer_pb2_grpc.add_DraftTrainerServiceServicer_to_server(servicer, server)

    server, address = await start_server(register, arguments.listen, [SERVICE_NAME])
    print(f"listening on {address}", flush=True)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(servicer.close)
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        tasks: list[asyncio.Task[None]] = []
        if arguments.controller:
            attachment = WorkerAttachment(
                arguments.controller,
                worker_id=arguments.worker_id,
                advertise=arguments.advertise,
                kind=controller_pb2.WORKER_KIND_DRAFT_TRAINER,
                address=address,
                heartbeat=servicer.heartbeat,
                num_gpus=int(device != "cpu"),
                info={"device": device},
            )
            task = asyncio.create_task(attachment.run(), name="controller attachment")
            stack.callback(task.cancel)
            tasks.append(task)
        await until_end(server.wait_for_termination(), *tasks)


if __name__ == "__main__":
    limit_threads()
    options = parse_arguments(sys.argv[1:])
    main(lambda: serve(options))

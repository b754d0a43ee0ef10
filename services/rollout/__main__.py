"""`python -m miles.services.rollout`: one inference engine as a service."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Sequence

from miles.addresses import address_argument, listen_argument
from miles.cores import limit_threads
from miles.rpc import WorkerAttachment, main, start_server
from miles.rpc.advertise import add_advertise_flag
from miles.rpc.gen import controller_pb2, rollout_pb2, rollout_pb2_grpc
from miles.services.rollout.service import RolloutServicer

STOP_GRACE_S = 5.0


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The service's command line."""
    parser = argparse.ArgumentParser(
        prog="python -m miles.services.rollout",
        description="Generates and scores responses; finished groups go into the sample queue of their job.",
    )
    add = parser.add_argument
    where = "where to listen; port 0 picks a free one"
    add("--listen", default="127.0.0.1:0", type=listen_argument, metavar="HOST:PORT", help=where)
    add_advertise_flag(parser)
    controller = "controller to attach to; without it the service stands alone"
    add("--controller", type=address_argument, metavar="HOST:PORT", help=controller)
    add("--worker-id", default="rollout-0", help="name of this worker, kept over its restarts")
    add("--device", help="device of engines: auto, cpu, cuda, cuda:1, ...; default: the one the job is configured with")
    add("--num-gpus", type=int, default=0, help="GPUs this worker holds, reported to the controller")
    engines = "SGLang servers of this worker"
    add("--engine-addrs", type=address_argument, nargs="+", default=[], metavar="HOST:PORT", help=engines)
    return parser.parse_args(arguments)


async def serve(flags: argparse.Namespace) -> None:
    """Serve until cancelled, then store the groups that run."""
    speed = await asyncio.to_thread(_speed, flags)
    servicer = RolloutServicer(worker_id=flags.worker_id, device=flags.device, engine_addresses=flags.engine_addrs)
    name = rollout_pb2.DESCRIPTOR.services_by_name["RolloutService"].full_name
    server, address = await start_server(
        lambda server: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server),
        flags.listen,
        [name],
        bandwidth_probes=False,
    )
    print(f"listening on {address}", flush=True)
    async with contextlib.AsyncExitStack() as closing:
        closing.push_async_callback(server.stop, STOP_GRACE_S)
        closing.push_async_callback(servicer.close)
        if flags.controller is None:
            await asyncio.Event().wait()
            return
        attachment = WorkerAttachment(
            flags.controller,
            worker_id=flags.worker_id,
            advertise=flags.advertise,
            kind=controller_pb2.WORKER_KIND_ROLLOUT,
            address=address,
            heartbeat=servicer.heartbeat,
            num_gpus=flags.num_gpus,
            info={"device": flags.device or "set by the job", **speed},
        )
        await attachment.run()


def _speed(flags: argparse.Namespace) -> dict[str, float]:
    if flags.engine_addrs:  # the engines run on other machines
        return {}
    from miles.precision.speed import worker_speed

    return worker_speed(flags.device or "auto")


if __name__ == "__main__":
    parsed = parse_flags()
    limit_threads()
    main(lambda: serve(parsed))

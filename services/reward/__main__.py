"""`python -m miles.services.reward`: the built-in rewards and a function of the user's as a service."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from miles.addresses import address_argument, listen_argument
from miles.reward_sdk import start_reward_server
from miles.reward_sdk.scorer import Scorer
from miles.rpc import ExitCode, ServiceExit, WorkerAttachment, main
from miles.rpc.advertise import add_advertise_flag
from miles.rpc.gen import controller_pb2
from miles.services.reward.builtin import BUILTIN, sources


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The service's command line."""
    parser = argparse.ArgumentParser(
        prog="python -m miles.services.reward", description="Scores samples for rollout services."
    )
    add = parser.add_argument
    where = "where to listen; port 0 picks a free one"
    add("--listen", default="127.0.0.1:0", type=listen_argument, metavar="HOST:PORT", help=where)
    builtin = f"built-in rewards to serve, of {', '.join(BUILTIN)}; default: all, or none beside a custom one"
    add("--rewards", nargs="*", metavar="NAME", help=builtin)
    custom = "a Python function, fn(sample) -> float or dict of floats, blocking or async; it is the default reward"
    add("--custom-rm-path", metavar="PACKAGE.MODULE.FUNCTION", help=custom)
    add("--group-rm", action="store_true", help="the custom function takes the samples of one prompt, returns a list")
    add("--workers", type=int, default=0, help="worker processes at most; 0 means one a core")
    add_advertise_flag(parser)
    controller = "controller to attach to; without it the service stands alone"
    add("--controller", type=address_argument, metavar="HOST:PORT", help=controller)
    add("--worker-id", default="reward-0", help="name of this worker, kept over its restarts")
    flags = parser.parse_args(arguments)
    if flags.rewards is None:
        flags.rewards = [] if flags.custom_rm_path else list(BUILTIN)
    if not flags.rewards and not flags.custom_rm_path:
        parser.error("nothing to serve: name --rewards or --custom-rm-path")
    if flags.group_rm and not flags.custom_rm_path:
        parser.error("--group-rm needs --custom-rm-path; the built-in rewards score samples one by one")
    return flags


def heartbeat(scorer: Scorer) -> controller_pb2.WorkerHeartbeat:
    """The worker's heartbeat to the controller: samples scored so far, and the load."""
    return controller_pb2.WorkerHeartbeat(
        progress=scorer.scored,
        activity="scoring" if scorer.running else "idle",
        load={"running_samples": scorer.running, "failed_samples": scorer.failed},
    )


async def serve(flags: argparse.Namespace) -> None:
    """Serve until cancelled."""
    try:
        served = sources(flags.rewards, flags.custom_rm_path, flags.group_rm)
    except ValueError as error:
        raise ServiceExit(ExitCode.BAD_CONFIG, str(error)) from error
    async with start_reward_server(served, flags.listen, workers=flags.workers) as (address, scorer):
        if flags.controller is None:
            await asyncio.Event().wait()
            return
        attachment = WorkerAttachment(
            flags.controller,
            worker_id=flags.worker_id,
            advertise=flags.advertise,
            kind=controller_pb2.WORKER_KIND_REWARD,
            address=address,
            heartbeat=lambda: heartbeat(scorer),
            info={"rewards": ", ".join(scorer.functions)},
        )
        await attachment.run()


if __name__ == "__main__":
    parsed = parse_flags()
    main(lambda: serve(parsed))

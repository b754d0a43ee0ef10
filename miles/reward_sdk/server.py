"""Starting a reward service: for the functions of a user's own script, and for `miles.services.reward`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Sequence

from miles.reward_sdk import functions
from miles.reward_sdk.functions import RewardLoadError, Source, StopScript
from miles.reward_sdk.scorer import Scorer
from miles.reward_sdk.servicer import SERVICE_NAME, RewardServicer
from miles.rpc import ExitCode, ServiceExit, main, start_server
from miles.rpc.gen import reward_pb2_grpc

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 2.0


@contextlib.asynccontextmanager
async def start_reward_server(
    sources: Sequence[Source], address: str, *, workers: int = 0, default: str = ""
) -> AsyncIterator[tuple[str, Scorer]]:
    """Serve the functions of `sources` on `address` (host:port, port 0 for any free one) within the `async with` block.

    Yields the address it listens on and the scorer. Raises `ServiceExit` when the functions cannot be loaded or the
    port is taken; see `Scorer.start` for `workers` and `default`.
    """
    try:
        scorer = await Scorer.start(sources, workers=workers, default=default)
    except RewardLoadError as error:
        raise ServiceExit(ExitCode.BAD_CONFIG, str(error)) from error
    async with contextlib.AsyncExitStack() as closing:
        closing.push_async_callback(scorer.close)
        servicer = RewardServicer(scorer)
        server, bound = await start_server(
            lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server),
            address,
            [SERVICE_NAME],
        )
        closing.push_async_callback(server.stop, _STOP_GRACE_S)
        logger.info("reward service listening on %s: %s", bound, ", ".join(scorer.functions))
        yield bound, scorer


def serve(*, port: int, host: str = "127.0.0.1", workers: int = 0, default: str = "") -> None:
    """Serve every function of the calling script that is decorated with `reward`, until Ctrl-C or SIGTERM.

    The functions run in worker processes, each of which runs the script from its top to this call. Code that must run
    only once belongs under `if __name__ == "__main__":`.

    Args:
        port: where to listen; 0 picks a free port and logs it.
        host: the interface to listen on; "0.0.0.0" for other machines to reach it. There is no access control.
        workers: worker processes at most; 0 means one a core.
        default: the reward for requests that name none; the first function by default.
    """
    if functions.running_script:
        raise StopScript
    script = _calling_script()

    async def run() -> None:
        async with start_reward_server([script], f"{host}:{port}", workers=workers, default=default):
            await asyncio.Event().wait()

    main(run)


def _calling_script() -> Source:
    script = sys.modules["__main__"]
    spec = getattr(script, "__spec__", None)
    if spec is not None:  # python -m package.module
        return Source(spec.name, script=True)
    path = getattr(script, "__file__", None)
    if path is None:
        raise RewardLoadError("serve() runs the functions of a script; put them in a file and run that")
    return Source(path, script=True)

"""The controller as a program."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import pathlib
from typing import TYPE_CHECKING

import grpc.aio
import redis.exceptions

from miles.addresses import listen_argument
from miles.queue import RedisInUse, RedisLease, RedisRefused, RedisUnsuitable, connect_async
from miles.queue.backpressure import TRANSIENT
from miles.redis_url import REDIS_URL_VARIABLE, redis_url_argument
from miles.rpc import ExitCode, ServiceExit, main, start_server
from miles.rpc.address_file import write_address
from miles.rpc.gen.controller_pb2_grpc import add_ControllerServiceServicer_to_server
from miles.rpc.gen.records_pb2_grpc import add_RecordsServiceServicer_to_server
from miles.tasks import cancelled_at_end

if TYPE_CHECKING:
    from miles.services.controller.jobs.store import JobStore
    from miles.services.controller.workers.registry import WorkerRegistry

logger = logging.getLogger(__name__)

_CHECK_RECORDS_S = 2.0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m miles.services.controller", description=__doc__)
    where = "host:port to serve on; port 0 picks one"
    parser.add_argument("--listen", default="127.0.0.1:50050", type=listen_argument, help=where)
    redis_help = (
        "redis://, rediss:// or unix:// address of the job records and queues; default: $MILES_REDIS_URL, which keeps "
        "a password out of the list of processes"
    )
    parser.add_argument(
        "--redis-url", type=redis_url_argument, default=os.environ.get(REDIS_URL_VARIABLE), help=redis_help
    )
    parser.add_argument(
        "--log-dir", type=pathlib.Path, help="folder of the services' logs; default: logs in each job's run folder"
    )
    parser.add_argument("--address-file", type=pathlib.Path, help="write the host:port served on to this file")
    arguments = parser.parse_args()
    if arguments.redis_url is None:
        parser.error(f"set {REDIS_URL_VARIABLE}, or give --redis-url")
    return arguments


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until cancelled."""
    try:
        client = await connect_async(arguments.redis_url)
    except RedisRefused as error:
        raise ServiceExit(ExitCode.REDIS_REFUSED, str(error)) from error
    except RedisUnsuitable as error:
        raise ServiceExit(ExitCode.REDIS_UNSUITABLE, str(error)) from error
    except redis.exceptions.ConnectionError as error:
        raise ServiceExit(ExitCode.REDIS_UNREACHABLE, str(error)) from error
    # Here, because they take seconds to load: what Redis says is said before.
    from miles.services.controller.artifacts.service import SERVICE_NAME as RECORDS_SERVICE_NAME
    from miles.services.controller.artifacts.service import RecordsServicer
    from miles.services.controller.jobs.runner import JobRunner
    from miles.services.controller.jobs.scheduler import JobScheduler
    from miles.services.controller.jobs.store import JobStore
    from miles.services.controller.service import ControllerServicer
    from miles.services.controller.workers.registry import WorkerRegistry

    store = JobStore(client)
    try:
        await store.check_keys()
        async with (await RedisLease.acquire(client)).kept() as keeping:
            registry = WorkerRegistry(first_lease_number=await store.first_lease_number())
            runner = JobRunner(store, registry, client, arguments.redis_url, arguments.log_dir)
            scheduler = JobScheduler(store, runner, registry)
            servicer = ControllerServicer(store, scheduler, registry)
            records = RecordsServicer(store, arguments.log_dir)

            def register(server: grpc.aio.Server) -> None:
                add_ControllerServiceServicer_to_server(servicer, server)
                add_RecordsServiceServicer_to_server(records, server)

            names = ["miles.v1.ControllerService", RECORDS_SERVICE_NAME]
            server, address = await start_server(register, arguments.listen, names, bandwidth_probes=False)
            try:
                if arguments.address_file is not None:
                    write_address(arguments.address_file, address)
                logger.info("controller listens on %s", address)
                working = (scheduler.run(), scheduler.tell_waits(), _expire_leases(registry), _notice_emptied(store))
                tasks = [asyncio.create_task(each) for each in working]
                async with cancelled_at_end(*tasks):
                    # Shielded: the lease is kept until the scheduler has let its job go, and given back last.
                    await asyncio.gather(*tasks, asyncio.shield(keeping))
            finally:
                await server.stop(grace=1.0)
    except TRANSIENT as error:
        raise ServiceExit(ExitCode.REDIS_UNREACHABLE, f"Redis was lost: {error}") from error
    except RedisInUse as error:
        raise ServiceExit(ExitCode.REDIS_IN_USE, str(error)) from error
    except RedisUnsuitable as error:
        raise ServiceExit(ExitCode.REDIS_UNSUITABLE, str(error)) from error
    finally:
        with contextlib.suppress(redis.exceptions.ConnectionError):
            await client.aclose()


async def _notice_emptied(store: JobStore) -> None:
    """Raise ServiceExit when the job records are deleted from under this process: nobody would see its jobs again."""
    while True:
        await asyncio.sleep(_CHECK_RECORDS_S)
        try:
            emptied = await store.is_emptied()
        except TRANSIENT:
            continue  # it restarts; the run waits for that
        if emptied:
            raise ServiceExit(
                ExitCode.REDIS_UNSUITABLE,
                "Redis was emptied, or restarted without its data: the records and queues of all jobs are gone; start "
                "again, and submit the jobs again: they go on from the newest checkpoints in their run folders",
            )


async def _expire_leases(registry: WorkerRegistry) -> None:
    while True:
        await asyncio.sleep(1.0)
        for worker in registry.expire():
            logger.warning("the worker lease of %s has ended: no heartbeat for %g s", worker.worker_id, registry.ttl_s)


if __name__ == "__main__":
    arguments = parse_arguments()
    main(lambda: serve(arguments))

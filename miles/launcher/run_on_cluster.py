"""Runs a coroutine on a cluster, and fails as soon as the cluster does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from miles.launcher.cluster import LocalCluster
from miles.launcher.drill.drill import Drill
from miles.tasks import cancelled_at_end

T = TypeVar("T")


async def run_on_cluster(
    work: Coroutine[Any, Any, T], cluster: LocalCluster, drill: Drill | None, rounds: int | None = None
) -> T:
    """Return the result of `work`. Meanwhile the drill, if any, runs for `rounds` rounds, or until `work` ends.

    Raises ProcessFailedError when a process of the cluster is not restarted any more, and ServiceExit when a service
    that the drill killed does not come back.
    """
    working = asyncio.create_task(work)
    drilling = [] if drill is None else [asyncio.create_task(drill.run(rounds))]
    watched: set[asyncio.Future[Any]] = {working, cluster.failed, *drilling}
    async with cancelled_at_end(working, *drilling):
        while not working.done():
            ended, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if working not in ended:
                for task in ended:
                    task.result()
        return working.result()

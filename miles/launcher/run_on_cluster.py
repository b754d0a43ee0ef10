"""Waiting for work on a cluster, unless the cluster fails first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from miles.launcher.cluster import LocalCluster
from miles.launcher.drill.drill import Drill

T = TypeVar("T")


async def attend(
    work: Coroutine[Any, Any, T], cluster: LocalCluster, drill: Drill | None, strikes: int | None = None
) -> T:
    """The result of `work`, with the drill going on meanwhile, for so many strikes or without end.

    Raises ProcessGivenUpError when a process of the cluster is given up, and ServiceExit when something that the drill
    killed does not come back.
    """
    working = asyncio.create_task(work)
    drilling = [] if drill is None else [asyncio.create_task(drill.run(strikes))]
    watched: set[asyncio.Future[Any]] = {working, cluster.failed, *drilling}
    try:
        while not working.done():
            ended, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if working not in ended:
                for task in ended:
                    task.result()
        return working.result()
    finally:
        for task in (working, *drilling):
            task.cancel()
        await asyncio.gather(working, *drilling, return_exceptions=True)

"""The teacher's scores of one group's samples: each is asked for when its response has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from miles.services.rollout.teachers.served import ServedTeachers
from miles.tasks import cancel
from miles.types import Sample


class GroupTeaching:
    """Has the samples of a group scored in place, while others of it are generated."""

    def __init__(self, teachers: ServedTeachers, samples: Sequence[Sample]) -> None:
        """`samples` may be replaced until their responses have ended."""
        self._teachers = teachers
        self._samples = samples
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, position: int) -> None:
        """Begin to score a response that has ended, unless it was scored before."""
        sample = self._samples[position]
        if not self._teachers.is_scored(sample):
            self._tasks.append(asyncio.create_task(self._teachers.score(sample)))

    async def finish(self) -> None:
        """Wait until every sample is scored. Raises as `ServedTeachers.score`."""
        await asyncio.gather(*self._tasks)

    async def aclose(self) -> None:
        """Cancel what is still being scored."""
        await cancel(*self._tasks)

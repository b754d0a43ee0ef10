"""Earlier responses to the prompts of groups, as drafts: read before a group's first request, kept when it has ended.

Drafts never change what is sampled, so that responses of evaluations and of training serve both, and no error of the
store ends a group: without drafts it is generated all the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from miles.queue import Holder, ResponseStore
from miles.services.rollout.groups.partial_response import FINISHED
from miles.tasks import cancel
from miles.telemetry.repeated_warnings import RepeatedWarnings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from miles.types import Sample

log = logging.getLogger(__name__)

READ_DEADLINE_S = 2.0
"""How long a group waits for drafts."""
ADD_DEADLINE_S = 30.0
_MOST_WAITING = 256
"""Groups whose responses wait to be kept while Redis is slow; those of further ones are left out."""


class EarlierResponses:
    """What a job's groups share: the store, and what became of asking it."""

    def __init__(
        self,
        store: ResponseStore,
        *,
        read_deadline_s: float = READ_DEADLINE_S,
        add_deadline_s: float = ADD_DEADLINE_S,
    ) -> None:
        self.found = 0
        """Prompts that had earlier responses, since the job was started here."""
        self.missed = 0
        """Prompts that had none, or whose responses could not be read."""
        self._store = store
        self._read_deadline_s = read_deadline_s
        self._add_deadline_s = add_deadline_s
        self._adding: set[asyncio.Task[None]] = set()
        self._repeated = RepeatedWarnings()

    async def of_prompt(self, prompt: npt.NDArray[np.int32]) -> Sequence[npt.NDArray[np.int32]]:
        """Return the responses kept to a prompt (int32 tokens), the newest first; none when the store is away."""
        found: Sequence[npt.NDArray[np.int32]] = ()
        try:
            async with asyncio.timeout(self._read_deadline_s):
                found = await self._store.newest(prompt)
        except (RedisError, OSError, TimeoutError) as error:
            self._warn(
                f"earlier responses could not be read: {_words(error)}; their prompts are answered without drafts"
            )
        if found:
            self.found += 1
        else:
            self.missed += 1
        return found

    def keep(self, prompt: npt.NDArray[np.int32], samples: Sequence[Sample], holder: Holder | None) -> None:
        """Keep the responses of a group that has ended, some time later, unless the worker lease of `holder` is over.

        `prompt` is that of the group's lease, under which its next lease looks for them.
        """
        responses = [sample.response_tokens for sample in samples if sample.status in FINISHED]
        if len(self._adding) < _MOST_WAITING:
            task = asyncio.create_task(self._add(prompt, responses, holder), name="keep responses as drafts")
            self._adding.add(task)
            task.add_done_callback(self._adding.discard)

    async def close(self) -> None:
        """Give up what is not kept yet."""
        await cancel(*self._adding)

    async def _add(
        self, prompt: npt.NDArray[np.int32], responses: Sequence[npt.NDArray[np.int32]], holder: Holder | None
    ) -> None:
        try:
            async with asyncio.timeout(self._add_deadline_s):
                await self._store.add(prompt, responses, holder)
        except (RedisError, OSError, TimeoutError) as error:
            self._warn(f"responses could not be kept as drafts: {_words(error)}")

    def _warn(self, text: str) -> None:
        if line := self._repeated.note(text):
            log.warning("%s", line)


class PromptDrafts:
    """The earlier responses to the prompt of one group, read once, when they are first asked for."""

    def __init__(self, earlier: EarlierResponses, prompt: npt.NDArray[np.int32]) -> None:
        self._earlier = earlier
        self._prompt = prompt
        self._found: Sequence[npt.NDArray[np.int32]] | None = None
        self._reading = asyncio.Lock()

    async def get(self) -> Sequence[npt.NDArray[np.int32]]:
        """Return the same responses to all who ask, the newest first."""
        async with self._reading:  # no shared task, which one of them could cancel for all
            if self._found is None:
                self._found = await self._earlier.of_prompt(self._prompt)
        return self._found


def _words(error: Exception) -> str:
    return str(error) or "no answer in time"

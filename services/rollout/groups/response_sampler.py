"""The `Sampler` protocol, behind which the responses of a group are generated, and its single-turn case.

`RolloutJob` chooses the sampler of each group.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from miles.services.rollout.groups.requests import GroupRequests
from miles.types import Sample


class Sampler(Protocol):
    """Generates the responses of one group. Created for one run of it.

    A response may take any number of engine requests, with other work between them. `GroupRun` knows nothing of
    requests: it starts `respond` for all unfinished samples at once, records what they yield, scores responses that
    ended and stores those that did not. A later run, perhaps on another worker, passes stored ones to `respond` again.
    """

    def respond(self, position: int, sample: Sample) -> AsyncGenerator[Sample, None]:
        """Continue the sample at this position of the group, yielding it each time it has grown.

        Every sample that is yielded replaces the one before and can be resumed from: its log-probabilities, version
        spans and loss mask cover its whole response, and whatever else a resumption needs is in its metadata. Tokens
        that the model did not sample, such as the output of a tool, have loss mask 0.

        The last one yielded is COMPLETED or TRUNCATED when the response ended, PENDING when `abort` ended it first.
        The response is decoded to text by the caller. An error fails the run of the whole group. Closing the generator
        early ends its requests.
        """

    async def abort(self) -> None:
        """End all requests of the group soon: each `respond` yields what it has and returns."""


class SingleTurnSampler:
    """Generates each response in one request."""

    def __init__(self, requests: GroupRequests) -> None:
        self._requests = requests

    async def respond(self, position: int, sample: Sample) -> AsyncGenerator[Sample, None]:
        """Yield the sample once, with its response or the part of it that an abort left."""
        yield await self._requests.extend(position, sample)

    async def abort(self) -> None:
        """End all requests of the group soon."""
        await self._requests.abort()

"""Rewards for one group's samples, by the job's configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from miles.reward_sdk.client import ScoreOutcome
from miles.tasks import cancel
from miles.telemetry.tracing import traced
from miles.types import Sample, SampleStatus, failed

if TYPE_CHECKING:
    from miles.config.sections.reward import RewardConfig


class RewardFailed(RuntimeError):
    """A sample could not be scored, and the configuration wants its group generated again."""


class ScoreClient(Protocol):
    """The part of `RewardClient` that is used here."""

    async def score(self, samples: Sequence[Sample], *, reward: str = "", group: bool = False) -> list[ScoreOutcome]:
        """One outcome a sample, in order; a failing service gives outcomes with an error, never an exception."""


class JobRewards:
    """Asks a job's reward services for rewards: which reward a sample gets, and what a failure does to it."""

    def __init__(self, client: ScoreClient, config: RewardConfig, *, optional: bool = False) -> None:
        """With `optional`, samples that nothing scores have reward 0."""
        self._client = client
        self._config = config
        self._optional = optional

    @property
    def whole_groups(self) -> bool:
        """True when the samples of a prompt are scored together."""
        return self._config.group_rm

    @traced("score")
    async def score_each(self, samples: Sequence[Sample]) -> list[ScoreOutcome]:
        """Score samples, each on its own; one outcome a sample, in order."""
        names = [self._name(sample) for sample in samples]
        if len(set(names)) == 1 and names[0] is not None:
            return await self._client.score(samples, reward=names[0])
        outcomes: dict[int, ScoreOutcome] = {i: ScoreOutcome(0.0) for i, name in enumerate(names) if name is None}

        async def score(name: str) -> None:
            chosen = [i for i, other in enumerate(names) if other == name]
            found = await self._client.score([samples[i] for i in chosen], reward=name)
            outcomes.update(zip(chosen, found, strict=True))

        await asyncio.gather(*(score(name) for name in dict.fromkeys(names) if name is not None))
        return [outcomes[i] for i in range(len(samples))]

    def _name(self, sample: Sample) -> str | None:
        """The reward of a sample; None where nothing scores it."""
        if self._optional and not self._config.scores(sample.metadata):
            return None
        return self._config.reward_of(sample.metadata)

    @traced("score")
    async def score_group(self, samples: Sequence[Sample]) -> list[ScoreOutcome]:
        """Score the samples of a prompt together; one outcome a sample, in order."""
        name = self._name(samples[0])
        if name is None:
            return [ScoreOutcome(0.0) for _ in samples]
        return await self._client.score(samples, reward=name, group=True)

    def mark_failed(self, sample: Sample, error: str) -> Sample:
        """Mark a sample that could not be scored: it is never trained on, and its metadata says why.

        Raises RewardFailed when the configuration says to generate the whole group again.
        """
        if self._config.reward_failure_policy == "retry":
            raise RewardFailed(f"sample {sample.index} could not be scored: {error}")
        return failed(sample, error)


class GroupScoring:
    """Scores the samples of one group in place: each when its response has ended, or all together at the end.

    Those that end at the same moment are asked for in one message.
    """

    def __init__(self, rewards: JobRewards, samples: list[Sample]) -> None:
        self.errors: dict[int, str] = {}
        """Why the reward of a sample failed, by position."""
        self._rewards = rewards
        self._samples = samples
        self._ended: list[int] = []
        """Positions of the responses that ended in this round of the event loop."""
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, position: int) -> None:
        """Begin to score a response that has ended, unless it has a reward or waits for its group."""
        if self._samples[position].reward is None and not self._rewards.whole_groups:
            if not self._ended:
                self._tasks.append(asyncio.create_task(self._score_ended()))
            self._ended.append(position)

    async def finish(self) -> None:
        """Wait until every sample has its reward or its error."""
        if not self._rewards.whole_groups:
            await asyncio.gather(*self._tasks)
            return
        chosen = [i for i, sample in enumerate(self._samples) if sample.status is not SampleStatus.FAILED]
        if chosen:
            outcomes = await self._rewards.score_group([self._samples[i] for i in chosen])
            for position, outcome in zip(chosen, outcomes, strict=True):
                self._apply(position, outcome)

    def scored(self) -> list[Sample]:
        """The samples, with failures marked. Raises RewardFailed."""
        return [
            self._rewards.mark_failed(sample, self.errors[i]) if i in self.errors else sample
            for i, sample in enumerate(self._samples)
        ]

    async def aclose(self) -> None:
        """Cancel what is still being scored."""
        await cancel(*self._tasks)

    async def _score_ended(self) -> None:
        await asyncio.sleep(0)  # the others of one batch of events end now
        positions, self._ended = self._ended, []
        outcomes = await self._rewards.score_each([self._samples[i] for i in positions])
        for position, outcome in zip(positions, outcomes, strict=True):
            self._apply(position, outcome)

    def _apply(self, position: int, outcome: ScoreOutcome) -> None:
        if outcome.error is None:
            sample = self._samples[position]
            sample.reward = outcome.reward
            if outcome.metadata:
                sample.metadata = {**sample.metadata, **outcome.metadata}
        else:
            self.errors[position] = outcome.error

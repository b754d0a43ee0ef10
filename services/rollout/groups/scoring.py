"""Rewards of one group's samples, by the job's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from miles.types import Sample, SampleStatus

if TYPE_CHECKING:
    from miles.config.sections.reward import RewardConfig
    from miles.reward_sdk.client import ScoreOutcome

REWARD_NAME_KEY = "rm_type"
"""Metadata by which a sample chooses its reward within the service."""


class RewardFailed(RuntimeError):
    """A sample could not be scored, and the configuration wants its group generated again."""


class Rewards(Protocol):
    """The part of `RewardClient` that is used here."""

    async def score(self, samples: Sequence[Sample], *, reward: str = "", group: bool = False) -> list[ScoreOutcome]:
        """One outcome a sample, in order; never raises for what a service does."""


class Scorer:
    """Asks the reward services about samples and applies what they say."""

    def __init__(self, rewards: Rewards, config: RewardConfig) -> None:
        self._rewards = rewards
        self._config = config

    @property
    def whole_groups(self) -> bool:
        """True when the samples of a prompt are scored together."""
        return self._config.group_rm

    async def score_one(self, sample: Sample) -> ScoreOutcome:
        """Score a sample on its own."""
        [outcome] = await self._rewards.score([sample], reward=self._reward_name(sample))
        return outcome

    async def score_group(self, samples: Sequence[Sample]) -> list[ScoreOutcome]:
        """Score the samples of a prompt together; one outcome a sample, in order."""
        return await self._rewards.score(samples, reward=self._reward_name(samples[0]), group=True)

    def mark_failed(self, sample: Sample, error: str) -> Sample:
        """The sample as one that could not be scored and is never trained on; its metadata says why.

        Raises RewardFailed when the configuration's policy is to try the whole group again.
        """
        if self._config.reward_failure_policy == "retry":
            raise RewardFailed(f"sample {sample.index} could not be scored: {error}")
        metadata = {**sample.metadata, "reward_error": error}
        return dataclasses.replace(
            sample, status=SampleStatus.FAILED, reward=None, metadata=metadata, remove_sample=True
        )

    def _reward_name(self, sample: Sample) -> str:
        chosen = sample.metadata.get(REWARD_NAME_KEY)
        if isinstance(chosen, str):
            return chosen
        # An outside service has its own names and its own default; rm_type names one of the built-in rewards.
        service = str(sample.metadata.get("reward_service", "default"))
        outside = service in self._config.service_addresses or self._config.custom_rm_path is not None
        return "" if outside or self._config.rm_type is None else self._config.rm_type


def apply_outcome(sample: Sample, outcome: ScoreOutcome) -> Sample:
    """The sample with its reward and what the reward function added to its metadata."""
    return dataclasses.replace(sample, reward=outcome.reward, metadata={**sample.metadata, **outcome.metadata})

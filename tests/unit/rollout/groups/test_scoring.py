"""How the responses of a group are scored as they end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from miles.config.sections.reward import RewardConfig
from miles.reward_sdk.client import ScoreOutcome
from miles.services.rollout.groups.scoring import GroupScoring, JobRewards
from miles.types import Sample, SampleStatus


class Scores:
    """Scores a sample with its index, and remembers what it was asked for at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []

    async def score(self, samples: Sequence[Sample], *, reward: str = "", group: bool = False) -> list[ScoreOutcome]:
        self.asked.append((reward, [sample.index for sample in samples]))
        return [
            ScoreOutcome(error="odd") if sample.metadata.get("fails") else ScoreOutcome(reward=float(sample.index))
            for sample in samples
        ]


@pytest.fixture
def scores() -> Scores:
    return Scores()


def group(count: int = 4) -> list[Sample]:
    return [Sample(group_id=1, index=i, prompt="p", status=SampleStatus.COMPLETED) for i in range(count)]


async def test_responses_that_end_together_are_asked_for_in_one_message(scores: Scores) -> None:
    samples = group()
    scoring = GroupScoring(JobRewards(scores, RewardConfig(rm_type="exact_match")), samples)
    scoring.begin(2)
    scoring.begin(0)
    while not scores.asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    scoring.begin(3)
    scoring.begin(1)
    await scoring.finish()
    assert [indices for _, indices in scores.asked] == [[2, 0], [3, 1]]
    assert [sample.reward for sample in scoring.scored()] == [0.0, 1.0, 2.0, 3.0]


async def test_a_response_that_has_its_reward_is_not_asked_for(scores: Scores) -> None:
    samples = group(2)
    samples[0].reward = 5.0
    scoring = GroupScoring(JobRewards(scores, RewardConfig(rm_type="exact_match")), samples)
    for position in range(2):
        scoring.begin(position)
    await scoring.finish()
    assert [indices for _, indices in scores.asked] == [[1]]
    assert [sample.reward for sample in samples] == [5.0, 1.0]


async def test_each_reward_of_a_group_is_asked_for_apart_and_answers_keep_their_order(scores: Scores) -> None:
    samples = group()
    samples[1].metadata["rm_type"] = "last_number"
    samples[2].metadata["rm_type"] = "last_number"
    outcomes = await JobRewards(scores, RewardConfig(rm_type="exact_match")).score_each(samples)
    assert sorted(scores.asked) == [("exact_match", [0, 3]), ("last_number", [1, 2])]
    assert [outcome.reward for outcome in outcomes] == [0.0, 1.0, 2.0, 3.0]


async def test_a_failure_is_of_its_response_alone(scores: Scores) -> None:
    samples = group(3)
    samples[1].metadata["fails"] = True
    config = RewardConfig(rm_type="exact_match", reward_failure_policy="drop")
    scoring = GroupScoring(JobRewards(scores, config), samples)
    for position in range(3):
        scoring.begin(position)
    await scoring.finish()
    assert [sample.reward for sample in scoring.scored()] == [0.0, None, 2.0]
    assert [sample.status for sample in scoring.scored()][1] is SampleStatus.FAILED


@pytest.mark.parametrize("whole", [False, True])
async def test_where_rewards_are_optional_what_nothing_scores_has_none(scores: Scores, whole: bool) -> None:
    samples = group(3)
    samples[1].metadata["rm_type"] = "last_number"
    rewards = JobRewards(scores, RewardConfig(group_rm=whole), optional=True)
    outcomes = await (rewards.score_group(samples) if whole else rewards.score_each(samples))
    assert [outcome.reward for outcome in outcomes] == [0.0, 0.0 if whole else 1.0, 0.0]
    assert scores.asked == ([] if whole else [("last_number", [1])])

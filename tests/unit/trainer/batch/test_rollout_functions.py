from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.extensions.loading import ExtensionError, ExtensionFailed
from miles.services.trainer.batch.rollout_batch import SHAPED_REWARD
from miles.services.trainer.batch.rollout_functions import RolloutFunctions
from miles.types import SampleGroup, SampleStatus
from miles.utils.types import Sample

Make = Callable[..., SampleGroup]


def drop_equal(args: Any, groups: Sequence[Sequence[Sample]]) -> None:
    """Take out the samples of groups whose rewards are all equal."""
    for group in groups:
        for sample in group:
            sample.remove_sample = len({one.get_reward_value(args) for one in group}) == 1


def minus_largest(args: Any, samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    raw = [sample.get_reward_value(args) for sample in samples]
    return raw, [reward - max(raw) for reward in raw]


def too_few(args: Any, samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    return [0.0], [0.0]


def nothing(args: Any, samples: Sequence[Sample]) -> None:
    return None


def broken(args: Any, samples: Sequence[Sample]) -> None:
    raise KeyError("score")


def functions(**paths: str) -> RolloutFunctions:
    dotted = {key: f"{__name__}.{name}" for key, name in paths.items()}
    return RolloutFunctions(JobConfig.from_flat(MINIMAL | dotted))


def scored(group: SampleGroup, *rewards: float) -> SampleGroup:
    group.samples[:] = [dataclasses.replace(s, reward=r) for s, r in zip(group.samples, rewards, strict=True)]
    return group


async def test_a_sample_filter_takes_samples_out_of_the_training(
    make_group: Make,
) -> None:
    groups = [scored(make_group(1, samples=2), 1.0, 1.0), scored(make_group(0, samples=2), 0.0, 1.0)]
    before = [s.tokens.tolist() for group in groups for s in group.samples]
    await functions(rollout_sample_filter_path="drop_equal").apply(groups)
    assert [[sample.remove_sample for sample in group.samples] for group in groups] == [[True, True], [False, False]]
    assert [s.tokens.tolist() for group in groups for s in group.samples] == before


async def test_rewards_of_the_users_own_are_kept_beside_those_that_are_reported(
    make_group: Make,
) -> None:
    groups = [scored(make_group(1, samples=2), 3.0, 5.0), scored(make_group(0, samples=2), 0.0, 1.0)]
    groups[0].samples[0] = dataclasses.replace(groups[0].samples[0], status=SampleStatus.FAILED, reward=None)
    await functions(custom_reward_post_process_path="minus_largest").apply(groups)
    assert [s.metadata.get(SHAPED_REWARD) for g in groups for s in g.samples] == [None, 0.0, -5.0, -4.0]
    assert [s.reward for g in groups for s in g.samples] == [None, 5.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("too_few", ExtensionError, "1 raw rewards and 1 rewards for 2 samples"),
        ("nothing", ExtensionError, r"return \(raw rewards, rewards\)"),
        ("broken", ExtensionFailed, "custom_reward_post_process_path raised KeyError: 'score'"),
    ],
)
async def test_what_cannot_be_used_is_an_error(name: str, error: type[Exception], words: str, make_group: Make) -> None:
    with pytest.raises(error, match=words.replace(" (", " \\(") if words.endswith("(") else words):
        await functions(custom_reward_post_process_path=name).apply([scored(make_group(0, samples=2), 0, 1)])

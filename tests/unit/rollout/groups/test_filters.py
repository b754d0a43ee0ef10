from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from miles.extensions.names import DYNAMIC_FILTERS
from miles.extensions.samples import given_prompt, users_group
from miles.rollout.filter_hub.base_types import DynamicFilterOutput
from miles.rollout.filter_hub.dynamic_sampling_filters import check_no_aborted, check_reward_nonzero_std
from miles.services.rollout.groups.filters import FilterError, GroupFilter, apply_filter, load_filter
from miles.services.rollout.groups.stats import group_stats, rewards_are_equal, scored_example
from miles.types import Reward, RewardKeyError, Sample, SampleGroup, SampleStatus, reward_number

ARGS: Any = SimpleNamespace(reward_key="a")


def of(function: Callable[..., Any]) -> GroupFilter:
    return GroupFilter(function, ARGS, given_prompt)


@pytest.fixture
def scored(make_group: Callable[..., SampleGroup]) -> Callable[[Sequence[Reward | None]], list[Sample]]:
    def make(rewards: Sequence[Reward | None]) -> list[Sample]:
        samples = make_group(0, samples=len(rewards)).samples
        return [dataclasses.replace(s, reward=r) for s, r in zip(samples, rewards, strict=True)]

    return make


Scored = Callable[[Sequence[Reward | None]], list[Sample]]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.0, 1.0], DynamicFilterOutput(True)),
        ([0.0, 0.0], DynamicFilterOutput(False, "zero_std_0")),
        ([{"a": 0.5, "b": 1.0}, {"a": 0.5, "b": 2.0}], DynamicFilterOutput(False, "zero_std_0.5")),
        ([{"a": 0.5}, {"a": 0.25}], DynamicFilterOutput(True)),
        ([1.0, None], DynamicFilterOutput(False, "zero_std_1")),
        ([1.0, None, 0.0], DynamicFilterOutput(True)),
        ([None], DynamicFilterOutput(False, "no_reward")),
    ],
)
def test_groups_with_a_reward_spread_are_kept(
    rewards: list[Reward | None], expected: DynamicFilterOutput, scored: Scored
) -> None:
    assert check_reward_nonzero_std(ARGS, users_group(scored(rewards))) == expected


def test_a_group_with_a_sample_that_failed_is_dropped(scored: Scored) -> None:
    samples = scored([1.0, 0.0])
    assert check_no_aborted(ARGS, users_group(samples)).keep
    samples[0] = dataclasses.replace(samples[0], status=SampleStatus.FAILED)
    assert check_no_aborted(ARGS, users_group(samples)) == DynamicFilterOutput(False, "group_has_aborted")


def test_filters_are_loaded_by_path() -> None:
    for path in DYNAMIC_FILTERS:
        loaded = load_filter(path, ARGS, given_prompt).function
        assert loaded in (check_reward_nonzero_std, check_no_aborted)
    for path in ("nowhere.at.all", "json.nothing", "json", "math.pi"):
        with pytest.raises(FilterError, match=path):
            load_filter(path, ARGS, given_prompt)


async def test_verdicts_of_every_form_are_understood(scored: Scored) -> None:
    samples = scored([1.0])

    def drop(args: Any, samples: Any) -> bool:
        return False

    async def slow(args: Any, samples: Any) -> Any:
        return SimpleNamespace(keep=False, reason=None)

    tensor = DynamicFilterOutput(keep=np.array(True))  # type: ignore[arg-type]
    assert (await apply_filter(of(lambda a, s: tensor), samples)) == DynamicFilterOutput(True)
    assert await apply_filter(None, samples) == DynamicFilterOutput(True)
    assert await apply_filter(of(lambda a, s: True), samples) == DynamicFilterOutput(True)
    assert (await apply_filter(of(drop), samples)).reason.endswith("drop")
    assert (await apply_filter(of(slow), samples)).reason.endswith("slow")
    assert await apply_filter(of(lambda a, s: DynamicFilterOutput(False, "x")), samples) == DynamicFilterOutput(
        False, "x"
    )


async def test_a_filter_that_fails_is_named(scored: Scored) -> None:
    def broken(args: Any, samples: Any) -> bool:
        raise KeyError("x")

    with pytest.raises(FilterError, match="broken raised KeyError"):
        await apply_filter(of(broken), scored([1.0]))
    with pytest.raises(FilterError, match="returned None"):
        await apply_filter(of(lambda a, s: None), scored([1.0]))

    async def impatient(args: Any, samples: Any) -> bool:
        raise TimeoutError("a server of the filter's own")

    with pytest.raises(FilterError, match="impatient raised TimeoutError: a server"):
        await apply_filter(of(impatient), scored([1.0]))


def test_stats_are_sums_over_the_samples(scored: Scored) -> None:
    samples = scored([2.0, -1.0, None])
    samples[0] = dataclasses.replace(samples[0], status=SampleStatus.TRUNCATED)
    samples[2] = dataclasses.replace(samples[2], status=SampleStatus.FAILED)
    stats = group_stats(samples, None, generate_s=1.5, reward_s=0.5)
    assert (stats.samples, stats.response_tokens, stats.max_response_tokens) == (3, 15, 5)
    assert (stats.truncated, stats.failed, stats.reward_sum, stats.reward_square_sum) == (1, 1, 1.0, 5.0)
    assert (stats.generate_s, stats.reward_s) == (1.5, 0.5)
    assert group_stats([], None, generate_s=0, reward_s=0).samples == 0


def test_a_group_shows_one_of_its_samples_cut_short(scored: Scored) -> None:
    samples = scored([1.0, None, 1.0])
    samples[0] = dataclasses.replace(samples[0], prompt="x" * 1000 + "?", response="y" * 1000 + "!", label="42")
    example = scored_example(samples, None)
    assert (example.prompt[-2:], example.response[-2:], example.label) == ("x?", "y!", "42")
    assert len(example.prompt) == len(example.response) == 400
    assert list(example.rewards) == [1.0, 1.0]
    assert rewards_are_equal(samples, None)
    assert not rewards_are_equal(scored([0.0, 1.0]), None)
    assert not rewards_are_equal(scored([None, None]), None)


def test_a_reward_with_parts_needs_a_key() -> None:
    assert reward_number({"a": 1.0, "b": 2.0}, "b") == 2.0
    for key in (None, "c"):
        with pytest.raises(RewardKeyError, match="a, b"):
            reward_number({"a": 1.0, "b": 2.0}, key)


async def test_a_filter_that_hangs_is_not_waited_for_without_end() -> None:
    async def hang(args: Any, samples: Any) -> bool:
        await asyncio.Event().wait()
        return True

    with pytest.raises(FilterError, match=r"hang gave no verdict within 0\.05 s"):
        await apply_filter(of(hang), [], deadline_s=0.05)

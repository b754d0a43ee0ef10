"""Rewards from which nothing can be learned are said."""

from __future__ import annotations

from miles.rpc.gen import rollout_pb2
from miles.services.controller.run.equal_rewards import EqualRewards


def example(*rewards: float, response: str = "4<end>") -> rollout_pb2.ScoredExample:
    return rollout_pb2.ScoredExample(prompt="2+2=", response=response, label="4", rewards=rewards)


def test_a_first_batch_of_equal_rewards_is_said_with_a_sample_and_seldom_again() -> None:
    equal = EqualRewards(4)
    lines = {n: line for n in range(1, 300) if (line := equal.note(example(0, 0)))}
    assert list(lines) == [4, 32, 256]
    assert "the last 4 groups has equal rewards" in lines[4]
    assert "rewards 0, 0 for prompt '2+2=', response '4<end>', label '4'" in lines[4]


def test_a_group_whose_rewards_differ_begins_the_count_again() -> None:
    equal = EqualRewards(4)
    for _ in range(50):
        assert not any(equal.note(each) for each in (example(0, 0), example(1, 1), example(0, 0), None))


def test_single_samples_are_compared_with_each_other() -> None:
    differing, constant = EqualRewards(4), EqualRewards(4)
    assert not any(differing.note(example(number % 2)) for number in range(50))
    assert [number for number in range(1, 10) if constant.note(example(1))] == [4]


def test_groups_without_rewards_say_nothing_of_them() -> None:
    equal = EqualRewards(1)
    assert equal.note(example()) == ""


def test_long_texts_are_cut_short_and_keep_their_end() -> None:
    line = EqualRewards(1).note(example(0, 0, response="x" * 5000 + "the answer"))
    assert "the answer'" in line
    assert len(line) < 600

"""Group ids map to prompts the same way every time; a position is one integer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data import PromptOrder, PromptSource, PromptTemplate, load_prompts
from miles.data.order import permutation
from miles.types import SampleStatus
from miles.types.convert import group_from_proto, group_to_proto

sizes = st.integers(1, 50)
seeds = st.integers(-(2**70), 2**70)


@settings(deadline=None)
@given(sizes, seeds, st.booleans(), st.integers(0, 10**6))
def test_every_epoch_holds_every_prompt_once(n: int, seed: int, shuffle: bool, epoch: int) -> None:
    order = PromptOrder(n, seed=seed, shuffle=shuffle)
    groups = range(epoch * n, (epoch + 1) * n)
    assert sorted(order.index(group) for group in groups) == list(range(n))
    assert {order.epoch(group) for group in groups} == {epoch}


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 10**9))
def test_a_prompt_depends_on_seed_and_group_alone(n: int, seed: int, group: int) -> None:
    permutation.cache_clear()
    fresh = PromptOrder(n, seed=seed, shuffle=True).index(group)
    used = PromptOrder(n, seed=seed, shuffle=True)
    assert [used.index(other) for other in range(3 * n)] == [used.index(other) for other in range(3 * n)]
    assert used.index(group) == fresh


def test_without_shuffle_the_order_is_the_files() -> None:
    order = PromptOrder(3)
    assert [order.index(group) for group in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(20, seed, epoch)) for seed in (0, 1, -1, 42) for epoch in range(5)}
    assert len(orders) == 20


def test_the_order_of_a_seed_never_changes() -> None:
    """A resumed run must see the order of the run before it, whatever was upgraded in between."""
    assert permutation(8, 42, 0).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]
    assert permutation(8, 42, 1).tolist() == [1, 2, 5, 3, 6, 0, 4, 7]


def test_epochs_give_the_number_of_groups() -> None:
    assert PromptOrder(7).num_groups(3) == 21


@pytest.mark.parametrize("group", [-1, -100])
def test_a_negative_group_is_refused(group: int) -> None:
    with pytest.raises(ValueError, match="group ids count from 0"):
        PromptOrder(3).index(group)


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_prompts = 0"):
        PromptOrder(0)


@pytest.fixture
def make_source(tokenizer: Any, write_jsonl: Callable[..., str]) -> Callable[..., PromptSource]:
    """Builds a source over n prompts: make_source(n, seed=0, shuffle=True)."""

    def make(n: int, *, seed: int = 0, shuffle: bool = True) -> PromptSource:
        rows = [{"input": f"q{i}", "metadata": {"i": i}} for i in range(n)]
        return PromptSource(load_prompts(write_jsonl(*rows), PromptTemplate(tokenizer)), seed=seed, shuffle=shuffle)

    return make


MakeSource = Callable[..., PromptSource]


def test_an_order_that_begins_at_a_later_group_gives_it_the_first_prompt(make_source: MakeSource) -> None:
    whole, later = make_source(5), make_source(5)
    later.begin_at(7)
    assert [later.prompt(group).prompt for group in later.take(9)] == [whole.prompt(i).prompt for i in range(9)]
    with pytest.raises(ValueError, match="count from 0"):
        later.prompt(6)


def test_the_identity_of_prompts_follows_their_contents_and_order(make_source: MakeSource) -> None:
    same = make_source(5).identity()
    assert json.loads(json.dumps(same)) == make_source(5).identity() | {"source": same["source"]}
    for other, key in (
        (make_source(6), "digest"),
        (make_source(5, seed=1), "rollout_seed"),
        (make_source(5, shuffle=False), "rollout_shuffle"),
    ):
        assert other.identity()[key] != same[key]


def test_a_group_holds_samples_that_wait_for_generation(make_source: MakeSource) -> None:
    source = make_source(5)
    group = source.group("job", 8, 3)
    record = source.prompt(8)
    assert (group.job_id, group.group_id) == ("job", 8)
    assert [sample.index for sample in group.samples] == [0, 1, 2]
    for sample in group.samples:
        assert (sample.group_id, sample.prompt, sample.metadata) == (8, record.prompt, record.metadata)
        assert sample.status is SampleStatus.PENDING
        assert sample.tokens.tolist() == record.tokens.tolist()
        assert sample.response_length == 0
    assert group_from_proto(group_to_proto(group)) == group


def test_changing_a_group_leaves_the_prompt_alone(make_source: MakeSource) -> None:
    source = make_source(1)
    source.group("job", 0, 2).samples[0].metadata["i"] = "changed"
    assert source.group("job", 0, 1).samples[0].metadata == {"i": 0}


def test_fewer_than_no_groups_cannot_be_taken(make_source: MakeSource) -> None:
    with pytest.raises(ValueError, match="count = -1"):
        make_source(1).take(-1)

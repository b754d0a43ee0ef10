"""The queue under random interleavings, on a real Redis: no group lost, none there twice, nothing left behind."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
import redis.asyncio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miles.queue import Fenced, GroupQueue, Holder, JobKeys, connect_async
from miles.queue.blobs import piece_keys
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan

T = TypeVar("T")
GROUPS = st.integers(0, 5)
INLINE_LIMIT = 600
"""Bytes: the even groups fit into their entries, the odd ones become blobs."""


def make_group(job_id: str, group_id: int, contents: int) -> SampleGroup:
    """A group of which several versions may be put: attempts need not generate the same."""
    response = 4 if group_id % 2 == 0 else 200
    sample = Sample(
        group_id=group_id,
        index=0,
        prompt="p",
        tokens=np.full(3 + response, contents, np.int32),
        response_length=response,
        response="r",
        reward=1.0,
        status=SampleStatus.COMPLETED,
        rollout_log_probs=np.zeros(response, np.float32),
        weight_versions=(VersionSpan(0, 0, response),),
    )
    return SampleGroup(job_id, group_id, [sample])


class Queue(RuleBasedStateMachine):
    """Two rollouts put, two trainers of the same name, one after the other, collect; leases end in between."""

    loop: ClassVar[asyncio.AbstractEventLoop]
    client: ClassVar[redis.asyncio.Redis]

    def __init__(self) -> None:
        super().__init__()
        self.job_id = f"machine-{uuid.uuid4().hex[:12]}"
        self.keys = JobKeys(self.job_id)
        self.producer = self.open()
        self.trainer = self.open()
        self.queued: dict[int, tuple[str, int]] = {}
        """Entry id and contents."""
        self.dropped: set[int] = set()
        self.done: set[int] = set()
        self.fences = {"a": 0, "b": 0}

    def open(self) -> GroupQueue:
        return GroupQueue(self.client, self.job_id, inline_limit=INLINE_LIMIT)

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @rule(group_id=GROUPS, worker=st.sampled_from("ab"), number=st.integers(0, 3), contents=st.integers(0, 1))
    def put(self, group_id: int, worker: str, number: int, contents: int) -> None:
        if group_id in self.done | self.dropped:
            return  # the controller leases none of these
        putting = self.producer.put(
            make_group(self.job_id, group_id, contents), attempt=1, holder=Holder(worker, number)
        )
        if number < self.fences[worker]:
            with pytest.raises(Fenced):
                self.do(putting)
            return
        entry_id = self.do(putting)
        assert self.queued.setdefault(group_id, (entry_id, contents))[0] == entry_id

    @rule(group_id=GROUPS, worker=st.sampled_from("ab"), number=st.integers(0, 3))
    def drop(self, group_id: int, worker: str, number: int) -> None:
        if group_id in self.done:
            return
        dropping = self.producer.drop(group_id, "no spread", holder=Holder(worker, number))
        if number < self.fences[worker]:
            with pytest.raises(Fenced):
                self.do(dropping)
        elif self.do(dropping):
            assert group_id not in self.queued
            self.dropped.add(group_id)
        else:
            assert group_id in self.queued

    @rule(worker=st.sampled_from("ab"), number=st.integers(0, 3))
    def fence(self, worker: str, number: int) -> None:
        self.do(self.producer.fence(worker, number))
        self.fences[worker] = max(self.fences[worker], number)

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def collect(self, data: st.DataObject) -> None:
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.queued)), unique=True, min_size=1))
        collected = self.do(self.trainer.collect(wanted, 10))
        assert list(collected) == wanted
        for group_id, (entry_id, group) in collected.items():
            assert (entry_id, int(group.samples[0].tokens[0])) == self.queued[group_id]

    @precondition(lambda self: self.queued or self.dropped)
    @rule(data=st.data())
    def a_checkpoint_covers_groups(self, data: st.DataObject) -> None:
        known = sorted({*self.queued, *self.dropped})
        covered = set(data.draw(st.lists(st.sampled_from(known), unique=True)))
        assert self.do(self.trainer.acknowledge(covered)) == len(covered & self.queued.keys())
        for group_id in covered:
            self.queued.pop(group_id, None)
        self.dropped -= covered
        self.done |= covered

    @rule()
    def the_trainer_restarts(self) -> None:
        self.trainer = self.open()

    @invariant()
    def everything_is_known(self) -> None:
        entries = self.do(self.producer.outstanding())
        assert {entry.group_id: entry.entry_id for entry in entries} == {
            group_id: entry_id for group_id, (entry_id, _) in self.queued.items()
        }
        assert set(self.do(self.producer.dropped())) == self.dropped
        assert self.do(self.client.xlen(self.keys.groups)) == len(self.queued)

    @invariant()
    def each_blob_has_its_entries(self) -> None:
        references = self.do(self.client.hgetall(self.keys.blob_refs))
        assert sum(int(count) for count in references.values()) == sum(group_id % 2 for group_id in self.queued)
        for blob_hash in references:
            keys = piece_keys(self.keys.blob_prefix, blob_hash.decode())
            assert self.do(self.client.exists(*keys)) == len(keys)

    def teardown(self) -> None:
        self.do(self.trainer.acknowledge([*self.queued, *self.dropped]))
        self.queued.clear()
        self.dropped.clear()
        self.each_blob_has_its_entries()
        self.do(self.producer.drop_job())


@pytest.fixture(scope="module", autouse=True)
def connection(redis_url: str) -> Iterator[None]:
    """The machine's connection to Redis, and the event loop that it is used in."""
    with asyncio.Runner() as runner:
        Queue.loop = runner.get_loop()
        Queue.client = runner.run(connect_async(redis_url))
        yield
        runner.run(Queue.client.aclose())


TestInterleavings = Queue.TestCase
TestInterleavings.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)

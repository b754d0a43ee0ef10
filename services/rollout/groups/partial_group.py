"""The samples of a running group, and their copy in Redis for the next lease of the group."""

from __future__ import annotations

import logging
import time

from redis.exceptions import RedisError

from miles.queue import PartialStore, QueueFull
from miles.services.rollout.groups.messages import GroupLease
from miles.services.rollout.groups.partial_response import (
    ENDED,
    cut_to_limit,
    is_rolled_back,
    merge_partial,
    without_response,
)
from miles.telemetry.tracing import traced
from miles.types import Sample, SampleGroup

log = logging.getLogger(__name__)

SAVE_DEADLINE_S = 30.0
SAVE_EVERY_S = 5.0
"""How often finished responses are stored while others of their group run, in case this process is killed."""


class PartialGroup:
    """The samples of one leased group so far. Only training groups are stored: an evaluation starts over."""

    def __init__(
        self,
        lease: GroupLease,
        job_id: str,
        store: PartialStore,
        *,
        record_experts: bool = False,
        record_top_tokens: bool = False,
    ) -> None:
        """With `record_experts`, a stored response without its routed experts starts over; so for likeliest tokens."""
        self._record_top_tokens = record_top_tokens and lease.is_training
        self.samples = list(lease.group.samples)
        """Replaced one by one as responses grow and rewards come."""
        self._lease = lease
        self._job_id = job_id
        self._store = store
        self._record_experts = record_experts and lease.is_training
        self._may_be_stored = False
        """Whether there may be a stored copy."""
        self._stored: dict[int, tuple[object, ...]] = {}
        """By position what was last stored of this attempt: the sample, and what scoring changes in it."""
        self._saved_responses = 0
        """Responses that had ended when the group was last stored."""
        self._saved_s = time.monotonic()

    @property
    def unfinished(self) -> list[int]:
        """Positions of the samples whose response has not ended."""
        return [i for i, sample in enumerate(self.samples) if sample.status not in ENDED]

    @traced("look for a partial group")
    async def resume(self) -> int:
        """Continue from what is stored or leased; returns the newest version among its tokens, 0 if there are none."""
        stored = await self._load() if self._lease.is_training else {}
        wanted = {"with_experts": self._record_experts, "with_top_tokens": self._record_top_tokens}
        resumed = [merge_partial(s, stored.get(s.index), **wanted) for s in self.samples]
        if self._lease.is_training:
            newest = self._lease.newest_version
            resumed = [without_response(sample) if is_rolled_back(sample, newest) else sample for sample in resumed]
        self.samples[:] = [
            cut_to_limit(sample, sampling.max_new_tokens)
            for sample, sampling in zip(resumed, self._lease.sampling, strict=True)
        ]
        return max((span.version for sample in resumed for span in sample.weight_versions), default=0)

    async def _load(self) -> dict[int, Sample]:
        try:
            partial = await self._store.load(self._lease.group_id)
        except ValueError as error:
            log.warning("group %d starts over: its stored responses are unreadable: %s", self._lease.group_id, error)
            self._may_be_stored = True
            return {}
        self._may_be_stored = partial is not None
        return {sample.index: sample for sample in partial.samples} if partial else {}

    async def save(self, deadline_s: float = SAVE_DEADLINE_S) -> int:
        """Store the responses so far of a training group; returns how many response tokens were stored."""
        tokens = sum(sample.response_length for sample in self.samples)
        if not self._lease.is_training or not tokens:
            return 0
        group_id = self._lease.group_id
        group = SampleGroup(self._job_id, group_id, list(self.samples))
        states = {i: (sample, *_scores(sample)) for i, sample in enumerate(group.samples)}
        changed = [group.samples[i].index for i, state in states.items() if not _is_same(state, self._stored.get(i))]
        self._may_be_stored = True
        try:
            saved = await self._store.save(
                *(group_id, group),
                attempt=self._lease.attempt,
                changed=changed if self._stored else None,
                deadline_s=deadline_s,
            )
            self._stored = states if saved else {}
        except (QueueFull, RedisError, ValueError) as error:
            log.warning("group %d: %d response tokens could not be stored: %s", group_id, tokens, error)
            return 0
        return tokens if saved else 0

    async def save_ended(self) -> None:
        """Store the group if responses have ended since it was last stored and that was a while ago."""
        ended = len(self.samples) - len(self.unfinished)
        if ended > self._saved_responses and time.monotonic() - self._saved_s >= SAVE_EVERY_S:
            await self.save(deadline_s=SAVE_EVERY_S)
            self._saved_responses, self._saved_s = ended, time.monotonic()

    async def delete(self) -> None:
        """Delete the stored copy, if there is one."""
        if self._may_be_stored:
            await self._store.delete(self._lease.group_id)


def _scores(sample: Sample) -> tuple[object, ...]:
    """What rewards and teachers change in a sample."""
    return (
        sample.reward,
        sample.metadata,
        sample.teacher_log_probs,
        sample.teacher_tokens,
        sample.teacher_token_log_probs,
    )


def _is_same(state: tuple[object, ...], stored: tuple[object, ...] | None) -> bool:
    return stored is not None and all(now is before for now, before in zip(state, stored, strict=True))

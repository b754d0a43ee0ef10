"""One lease from prompt to queue: generate, score, filter, put; or give up and keep what there is."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import RedisError

from miles.queue import Fenced, GroupQueue, Holder, PartialStore, QueueFull
from miles.rpc.gen import rollout_pb2
from miles.services.rollout.engines.base import GenerationRequest, RolloutEngine
from miles.services.rollout.groups.filters import FilterError, GroupFilter, apply_filter
from miles.services.rollout.groups.messages import Failed, Finished, Lease, Outcome, Purpose, Returned
from miles.services.rollout.groups.scoring import RewardFailed, Scorer, apply_outcome
from miles.services.rollout.groups.stats import group_stats
from miles.services.rollout.groups.trajectory import (
    FINISHED,
    Piece,
    cut_to_limit,
    experts_start,
    extend,
    is_rolled_back,
    mask_older_versions,
    merge_begun,
    without_response,
)
from miles.services.rollout.serving.version_gate import VersionGate, VersionPassed
from miles.types import Sample, SampleGroup, SampleStatus
from miles.types.validate import check_group

if TYPE_CHECKING:
    from miles.config import JobConfig

log = logging.getLogger(__name__)

VERSION_DEADLINE_S = 300.0
ABORT_DEADLINE_S = 30.0
"""How long the engine may take to end aborted requests; after that their new tokens are lost."""
SAVE_DEADLINE_S = 30.0
KEEP_EVERY_S = 5.0
"""How often responses that have ended are stored while others of their group run, for the case that this is killed."""

_serials = itertools.count()
_T = TypeVar("_T")


class _GivenUp(Exception):
    """The group was cancelled, or the engine aborted it."""


@dataclasses.dataclass(frozen=True, slots=True)
class GroupTools:
    """What the groups of a job share."""

    job_id: str
    config: JobConfig
    engine: RolloutEngine
    gate: VersionGate
    decode: Callable[[Sequence[int], bool], str]
    """(response tokens, leave out special tokens) -> text."""
    scorer: Scorer
    queue: GroupQueue
    partials: PartialStore
    group_filter: GroupFilter | None = None

    @property
    def with_experts(self) -> bool:
        """Whether training groups record the experts that were chosen."""
        return self.config.rollout.use_rollout_routing_replay


class GroupRun:
    """Carries out one lease. Call `run` once; `give_up` at any time makes it end soon."""

    def __init__(self, lease: Lease, tools: GroupTools, holder: Holder | None = None) -> None:
        """`holder`: the worker's own lease, without which nothing it does is fenced."""
        self.lease = lease
        self._holder = holder
        self._tools = tools
        self._samples = list(lease.group.samples)
        """As far as they have got: replaced one by one as responses end and rewards come."""
        self._errors: dict[int, str] = {}
        """Why the reward of a sample failed, by position."""
        self._scoring: list[asyncio.Task[None]] = []
        self._given_up = asyncio.Event()
        self._serial = next(_serials)
        self._training = lease.purpose is Purpose.TRAIN
        self._started = self._kept_s = time.monotonic()
        self._kept_responses = 0
        """Responses that had ended when the group was last stored."""

    def give_up(self) -> None:
        """End as soon as possible: abort the generation and keep what there is for whoever resumes the group."""
        self._given_up.set()

    async def run(self) -> Outcome:
        """Do the work and say what came of it. Raises nothing but what is a bug or a cancellation."""
        try:
            return await self._work()
        except _GivenUp:
            return Returned(await self._keep())
        except Fenced as error:
            log.warning("%s", error)
            return Returned(await self._keep())
        except RewardFailed as error:
            # The responses are kept: whoever tries again only has to score them.
            await self._keep()
            return Failed(str(error))
        except (VersionPassed, TimeoutError) as error:
            await self._keep()
            return Failed(str(error))
        except (FilterError, ValueError) as error:
            return Failed(f"{type(error).__name__}: {error}", retryable=False)
        except Exception as error:  # whatever an engine, Redis or the network raises: this attempt failed
            log.warning("group %d: %s: %s", self.lease.group_id, type(error).__name__, error, exc_info=error)
            await self._keep()
            return Failed(f"{type(error).__name__}: {error}")
        finally:
            for task in self._scoring:
                task.cancel()
            await asyncio.gather(*self._scoring, return_exceptions=True)

    async def _work(self) -> Outcome:
        lease, tools = self.lease, self._tools
        if (known := await self._unless_given_up(self._already_known())) is not None:
            return known
        begun_with = await self._unless_given_up(self._resume())
        minimum = max(lease.min_version or 0, begun_with)  # versions of a response ascend
        await self._unless_given_up(tools.gate.wait(minimum, lease.exact_version, VERSION_DEADLINE_S))
        await self._generate_all()
        generated = time.monotonic()
        self._check_version()
        await self._unless_given_up(self._score_all())
        scored = time.monotonic()
        samples = [self._with_failure(i, sample) for i, sample in enumerate(self._samples)]
        if self._training and tools.config.rollout.mask_offpolicy_in_partial_rollout:
            samples = [mask_older_versions(sample) for sample in samples]
        group = SampleGroup(tools.job_id, lease.group_id, samples)
        check_group(group)
        key = tools.config.reward.reward_key if self._training else tools.config.reward.eval_reward_key
        stats = group_stats(samples, key, generate_s=generated - self._started, reward_s=scored - generated)
        done = Finished(stats, oldest_version=group.oldest_version or 0)
        if not self._training:
            return dataclasses.replace(done, group=group)
        return await self._unless_given_up(self._filter_and_put(group, done))

    async def _already_known(self) -> Finished | None:
        """An earlier attempt may have queued or dropped the group when the word of it was lost."""
        if not self._training:
            return None
        if (reason := await self._tools.queue.why_dropped(self.lease.group_id)) is not None:
            return Finished(rollout_pb2.GroupStats(), keep=False, reason=reason)
        if (found := await self._tools.queue.find(self.lease.group_id)) is None:
            return None
        entry_id, group = found
        stats = group_stats(group.samples, self._tools.config.reward.reward_key, generate_s=0.0, reward_s=0.0)
        return Finished(stats, oldest_version=group.oldest_version or 0, entry_id=entry_id)

    async def _resume(self) -> int:
        """Take up what there is of the group; returns the newest version among its tokens, 0 without any."""
        stored: dict[int, Sample] = {}
        if self._training:
            try:
                partial = await self._tools.partials.load(self.lease.group_id)
            except ValueError as error:
                log.warning("group %d: what was stored of it cannot be read: %s", self.lease.group_id, error)
                partial = None
            stored = {sample.index: sample for sample in partial.samples} if partial else {}
        with_experts = self._training and self._tools.with_experts
        begun = [merge_begun(s, stored.get(s.index), with_experts=with_experts) for s in self._samples]
        if self._training:
            newest = self.lease.newest_version
            begun = [without_response(sample) if is_rolled_back(sample, newest) else sample for sample in begun]
        self._samples = [
            cut_to_limit(sample, sampling.max_new_tokens)
            for sample, sampling in zip(begun, self.lease.sampling, strict=True)
        ]
        return max((span.version for sample in begun for span in sample.weight_versions), default=0)

    async def _generate_all(self) -> None:
        """Generate every unfinished sample at once; `_GivenUp` when not all of them ended by themselves."""
        tasks = [asyncio.create_task(self._generate(i)) for i in range(len(self._samples))]
        given_up = asyncio.create_task(self._given_up.wait())
        try:
            pending: set[asyncio.Task[Any]] = {given_up, *tasks}
            while given_up in pending and len(pending) > 1 and not _failed(tasks):
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                await self._keep_ended()
            if any(not task.done() for task in tasks):
                await self._abort(tasks)
        finally:
            for task in (given_up, *tasks):
                task.cancel()
            await asyncio.gather(given_up, *tasks, return_exceptions=True)
        for error in _failed(tasks):
            raise error
        if self._given_up.is_set() or any(sample.status not in FINISHED for sample in self._samples):
            raise _GivenUp

    async def _abort(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        await self._tools.engine.abort([self._request_id(i) for i, task in enumerate(tasks) if not task.done()])
        _, late = await asyncio.wait(tasks, timeout=ABORT_DEADLINE_S)
        if late:
            log.warning(
                "group %d: %d requests did not end within %.0f s of their abort; what they generated is lost",
                *(self.lease.group_id, len(late), ABORT_DEADLINE_S),
            )

    async def _generate(self, i: int) -> None:
        sample, sampling = self._samples[i], self.lease.sampling[i]
        if sample.status not in FINISHED:
            request = GenerationRequest(
                request_id=self._request_id(i),
                input_ids=sample.tokens.tolist(),
                sampling=sampling,
                resumed_tokens=sample.response_length,
                return_routed_experts=self._training and self._tools.with_experts,
                routed_experts_start=experts_start(sample),
                group=f"{self.lease.purpose.value}-{self.lease.group_id}",
            )
            piece = Piece()
            async with contextlib.aclosing(self._tools.engine.generate(request)) as deltas:
                async for delta in deltas:
                    piece.add(delta)
            sample = extend(sample, piece)
            if sample.status in FINISHED:
                text = self._tools.decode(sample.response_tokens.tolist(), self.lease.skip_special_tokens[i])
                sample = dataclasses.replace(sample, response=text)
            self._samples[i] = sample
        if sample.status in FINISHED and sample.reward is None and not self._tools.scorer.whole_groups:
            self._scoring.append(asyncio.create_task(self._score(i)))

    async def _score(self, i: int) -> None:
        outcome = await self._tools.scorer.score_one(self._samples[i])
        if outcome.error is None:
            self._samples[i] = apply_outcome(self._samples[i], outcome)
        else:
            self._errors[i] = outcome.error

    async def _score_all(self) -> None:
        if not self._tools.scorer.whole_groups:
            await asyncio.gather(*self._scoring)
            return
        outcomes = await self._tools.scorer.score_group(self._samples)
        for i, outcome in enumerate(outcomes):
            if outcome.error is None:
                self._samples[i] = apply_outcome(self._samples[i], outcome)
            else:
                self._errors[i] = outcome.error

    def _with_failure(self, i: int, sample: Sample) -> Sample:
        return self._tools.scorer.mark_failed(sample, self._errors[i]) if i in self._errors else sample

    def _check_version(self) -> None:
        exact = self.lease.exact_version
        versions = {span.version for sample in self._samples for span in sample.weight_versions}
        if exact is not None and versions - {exact}:
            raise VersionPassed(f"versions {sorted(versions)} generated the group, not {exact} alone")

    async def _filter_and_put(self, group: SampleGroup, done: Finished) -> Finished:
        tools = self._tools
        if all(sample.status is SampleStatus.FAILED for sample in group.samples):
            errors = "; ".join(sorted(set(self._errors.values())))
            return await self._drop(done, f"no sample could be scored: {errors}")
        verdict = await apply_filter(tools.group_filter, tools.config, group.samples)
        if verdict.keep:
            entry_id = await tools.queue.put(
                group, attempt=self.lease.attempt, oldest_version=done.oldest_version, holder=self._holder
            )
            done = dataclasses.replace(done, entry_id=entry_id)
        else:
            done = await self._drop(done, verdict.reason)
        await tools.partials.delete(group.group_id)
        return done

    async def _drop(self, done: Finished, reason: str) -> Finished:
        await self._tools.queue.drop(self.lease.group_id, reason, holder=self._holder)
        return dataclasses.replace(done, keep=False, reason=reason)

    async def _keep_ended(self) -> None:
        """Store the group when responses have ended since it was stored and that is a while ago."""
        ended = sum(sample.status in FINISHED for sample in self._samples)
        if ended > self._kept_responses and time.monotonic() - self._kept_s >= KEEP_EVERY_S:
            await self._keep(deadline_s=KEEP_EVERY_S)
            self._kept_responses, self._kept_s = ended, time.monotonic()

    async def _keep(self, deadline_s: float = SAVE_DEADLINE_S) -> int:
        """Store what there is of a training group; returns how many response tokens that is."""
        tokens = sum(sample.response_length for sample in self._samples)
        if not self._training or not tokens:
            return 0
        group = SampleGroup(self._tools.job_id, self.lease.group_id, self._samples)
        try:
            saved = await self._tools.partials.save(
                self.lease.group_id, group, attempt=self.lease.attempt, deadline_s=deadline_s
            )
        except (QueueFull, RedisError, ValueError) as error:
            log.warning("group %d: %d response tokens could not be kept: %s", self.lease.group_id, tokens, error)
            return 0
        return tokens if saved else 0

    async def _unless_given_up(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`, which is cancelled, and `_GivenUp` raised, when the group is given up meanwhile."""
        task = asyncio.create_task(work)
        given_up = asyncio.create_task(self._given_up.wait())
        try:
            await asyncio.wait({task, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _GivenUp
        finally:
            for each in (task, given_up):
                each.cancel()
            await asyncio.gather(task, given_up, return_exceptions=True)

    def _request_id(self, i: int) -> str:
        lease = self.lease
        return f"{lease.purpose.value}-{lease.group_id}-{lease.attempt}-{i}-{self._serial}"


def _failed(tasks: Sequence[asyncio.Task[None]]) -> list[BaseException]:
    finished = [task for task in tasks if task.done() and not task.cancelled()]
    return [error for task in finished if (error := task.exception()) is not None]

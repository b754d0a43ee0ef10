"""The run of one group lease: generate, score, filter and queue the group, or store it for a later run."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from miles.queue import Fenced, GroupQueue, Holder, PartialStore
from miles.rpc.gen import rollout_pb2
from miles.services.rollout.groups.earlier_responses import EarlierResponses
from miles.services.rollout.groups.filters import FilterError, GroupFilter, apply_filter
from miles.services.rollout.groups.messages import Failed, Finished, GroupLease, Outcome, Preempted
from miles.services.rollout.groups.partial_group import PartialGroup
from miles.services.rollout.groups.partial_response import ENDED, FINISHED, mask_older_versions
from miles.services.rollout.groups.response_sampler import Sampler
from miles.services.rollout.groups.scoring import GroupScoring, JobRewards, RewardFailed
from miles.services.rollout.groups.stats import group_stats, rewards_are_equal, scored_example
from miles.services.rollout.serving.version_gate import VersionGate, VersionPassed
from miles.services.rollout.teachers.group_teaching import GroupTeaching
from miles.services.rollout.teachers.served import ServedTeachers
from miles.services.rollout.teachers.server import TeacherFailed
from miles.tasks import cancelled_at_end
from miles.telemetry.repeated_warnings import RepeatedWarnings
from miles.telemetry.tracing import traced
from miles.types import SampleGroup, SampleStatus
from miles.types.validate import check_group

if TYPE_CHECKING:
    from miles.config import JobConfig

log = logging.getLogger(__name__)

VERSION_DEADLINE_S = 300.0
ABORT_DEADLINE_S = 30.0
"""How long the engine may take to end aborted requests; after that their new tokens are lost."""

_T = TypeVar("_T")


class _RunPreempted(Exception):
    """The run was preempted, or the engine aborted its requests."""


@dataclasses.dataclass(frozen=True, slots=True)
class GroupTools:
    """What the groups of a job share."""

    job_id: str
    config: JobConfig
    create_sampler: Callable[[GroupLease], Sampler]
    """Called once for each run of a group."""
    gate: VersionGate
    decode: Callable[[Sequence[int], bool], str]
    """(response tokens, leave out special tokens) -> text, without the token that ended the response."""
    rewards: JobRewards
    queue: GroupQueue
    partials: PartialStore
    teachers: ServedTeachers | None = None
    """Of on-policy distillation, behind servers."""
    group_filter: GroupFilter | None = None
    earlier: EarlierResponses | None = None
    """Keeps the responses of groups that have ended as drafts; None when no engine drafts from them."""
    repeated: RepeatedWarnings = dataclasses.field(default_factory=RepeatedWarnings)
    """Of failures, so that the log does not repeat them."""


class GroupRun:
    """Runs one group lease. Call `run` once; `preempt` ends it early at any time."""

    def __init__(self, lease: GroupLease, tools: GroupTools, holder: Holder | None = None) -> None:
        """`holder`: the worker lease under which results are put; without one, none of them is fenced."""
        self.lease = lease
        self._tools = tools
        self._holder = holder
        self._sampler = tools.create_sampler(lease)
        record_experts = tools.config.rollout.records_routing
        self._partial = PartialGroup(
            *(lease, tools.job_id, tools.partials),
            record_experts=record_experts,
            record_top_tokens=tools.config.distillation.engine_top_k > 0,
        )
        self._scoring = GroupScoring(tools.rewards, self._partial.samples)
        teachers = tools.teachers if lease.is_training else None
        self._teaching = None if teachers is None else GroupTeaching(teachers, self._partial.samples)
        self._preempted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._started = time.monotonic()

    def preempt(self) -> None:
        """End the run soon: abort its requests and store the responses so far for the next run of the group."""
        if not self._preempted.done():
            self._preempted.set_result(None)

    async def run(self) -> Outcome:
        """Run to an outcome. Raises only on a bug or when it is cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            for each in (self._scoring, self._teaching):
                if each is not None:
                    stack.push_async_callback(each.aclose)
            return await self._outcome()

    async def _outcome(self) -> Outcome:
        try:
            return await self._work()
        except _RunPreempted:
            return Preempted(await self._partial.save())
        except Fenced as error:
            log.warning("%s", error)
            return Preempted(await self._partial.save())
        except (RewardFailed, TeacherFailed, VersionPassed, TimeoutError) as error:
            # After a failed reward the responses are stored, so that the next attempt only has to score them.
            await self._partial.save()
            return Failed(str(error))
        except (FilterError, ValueError) as error:
            return Failed(f"{type(error).__name__}: {error}", retryable=False)
        except Exception as error:  # whatever an engine, Redis or the network raises: this attempt failed
            if line := self._tools.repeated.note(f"group {self.lease.group_id}: {type(error).__name__}: {error}"):
                log.warning("%s", line, exc_info=error)
            await self._partial.save()
            return Failed(f"{type(error).__name__}: {error}")

    @traced("group", lambda run: run.lease.group_id)
    async def _work(self) -> Outcome:
        lease, tools = self.lease, self._tools
        known, resumed_version = await self._unless_preempted(self._earlier_runs())
        if known is not None:
            return known
        minimum = max(lease.min_version or 0, resumed_version)  # versions of a response ascend
        await self._unless_preempted(tools.gate.wait(minimum, lease.exact_version, VERSION_DEADLINE_S))
        await self._generate()
        generated = time.monotonic()
        self._check_version()
        await self._unless_preempted(self._score())
        scored = time.monotonic()
        samples = self._scoring.scored()
        if tools.earlier is not None:
            tools.earlier.keep(lease.group.samples[0].prompt_tokens, samples, self._holder)
        if lease.is_training and tools.config.rollout.mask_offpolicy_in_partial_rollout:
            samples = [mask_older_versions(sample) for sample in samples]
        group = SampleGroup(tools.job_id, lease.group_id, samples)
        if not lease.is_training:
            check_group(group)  # the queue checks what it is given
        key = tools.config.reward.reward_key if lease.is_training else tools.config.reward.eval_reward_key
        stats = group_stats(samples, key, generate_s=generated - self._started, reward_s=scored - generated)
        done = Finished(stats, oldest_version=group.oldest_version or 0)
        if not lease.is_training:
            return dataclasses.replace(done, group=group)
        if rewards_are_equal(samples, key) and not tools.config.distillation.rewards_are_optional:
            done = dataclasses.replace(done, example=scored_example(samples, key))
        return await self._unless_preempted(self._filter_and_put(group, done))

    @traced("look for earlier runs")
    async def _earlier_runs(self) -> tuple[Finished | None, int]:
        """What became of the group in earlier attempts: an outcome, or the version up to which its responses are.

        All is asked for at once: groups that are leased together share a round trip to Redis.
        """
        outcome, resumed = asyncio.create_task(self._earlier_outcome()), asyncio.create_task(self._partial.resume())
        async with cancelled_at_end(outcome, resumed):
            return await outcome, await resumed

    async def _earlier_outcome(self) -> Finished | None:
        """The outcome of an earlier attempt that queued or dropped the group, if its report was lost."""
        if not self.lease.is_training:
            return None
        queue, group_id = self._tools.queue, self.lease.group_id
        reason, found = await asyncio.gather(queue.why_dropped(group_id), queue.find(group_id))
        if reason is not None:
            return Finished(rollout_pb2.GroupStats(), keep=False, reason=reason)
        if found is None:
            return None
        entry_id, group = found
        stats = group_stats(group.samples, self._tools.config.reward.reward_key, generate_s=0.0, reward_s=0.0)
        return Finished(stats, oldest_version=group.oldest_version or 0, entry_id=entry_id)

    @traced("generate")
    async def _generate(self) -> None:
        """Generate all responses at once. Raises _RunPreempted unless every one of them ended by itself."""
        tasks = [asyncio.create_task(self._respond(i)) for i in range(len(self._partial.samples))]
        preempted = self._preempted
        async with cancelled_at_end(*tasks):
            pending: set[asyncio.Future[Any]] = {preempted, *tasks}
            while preempted in pending and len(pending) > 1 and not _errors(tasks):
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                await self._partial.save_ended()
            if any(not task.done() for task in tasks):
                await self._abort(tasks)
        for error in _errors(tasks):
            raise error
        if self._preempted.done() or self._partial.unfinished:
            raise _RunPreempted

    async def _respond(self, i: int) -> None:
        samples = self._partial.samples
        if samples[i].status not in ENDED:
            async with contextlib.aclosing(self._sampler.respond(i, samples[i])) as grown:
                async for sample in grown:
                    if sample.status in FINISHED and not sample.response:
                        tokens = sample.response_tokens.tolist()
                        sample.response = self._tools.decode(tokens, self.lease.skip_special_tokens[i])
                    samples[i] = sample
        if samples[i].status in FINISHED:
            self._scoring.begin(i)
            if self._teaching is not None:
                self._teaching.begin(i)

    async def _score(self) -> None:
        """Wait until all are scored, by rewards and by teachers."""
        if self._teaching is None:
            await self._scoring.finish()
        else:
            await asyncio.gather(self._scoring.finish(), self._teaching.finish())

    async def _abort(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        await self._sampler.abort()
        _, late = await asyncio.wait(tasks, timeout=ABORT_DEADLINE_S)
        if late:
            log.warning(
                "group %d: %d responses did not end within %.0f s of their abort; their new tokens are lost",
                *(self.lease.group_id, len(late), ABORT_DEADLINE_S),
            )

    def _check_version(self) -> None:
        exact = self.lease.exact_version
        versions = {span.version for sample in self._partial.samples for span in sample.weight_versions}
        if exact is not None and versions - {exact}:
            raise VersionPassed(f"versions {sorted(versions)} generated the group, not {exact} alone")

    @traced("filter and queue")
    async def _filter_and_put(self, group: SampleGroup, done: Finished) -> Finished:
        tools = self._tools
        if all(sample.status is SampleStatus.FAILED for sample in group.samples):
            reasons = {str(sample.metadata.get("reward_error") or "") for sample in group.samples}
            errors = "; ".join(sorted(reasons))
            return await self._drop(done, f"no sample could be scored: {errors}")
        verdict = await apply_filter(tools.group_filter, group.samples)
        if verdict.keep:
            entry_id = await tools.queue.put(
                group, attempt=self.lease.attempt, oldest_version=done.oldest_version, holder=self._holder
            )
            done = dataclasses.replace(done, entry_id=entry_id)
        else:
            done = await self._drop(done, verdict.reason or "")
        await self._partial.delete()
        return done

    async def _drop(self, done: Finished, reason: str) -> Finished:
        await self._tools.queue.drop(self.lease.group_id, reason, holder=self._holder)
        example = scored_example(self._scoring.scored(), self._tools.config.reward.reward_key)
        return dataclasses.replace(done, keep=False, reason=reason, example=example)

    async def _unless_preempted(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`; when the run is preempted first, cancels it and raises _RunPreempted."""
        task = asyncio.create_task(work)
        async with cancelled_at_end(task):
            either: set[asyncio.Future[Any]] = {task, self._preempted}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _RunPreempted


def _errors(tasks: Sequence[asyncio.Task[None]]) -> list[BaseException]:
    ended = [task for task in tasks if task.done() and not task.cancelled()]
    return [error for task in ended if (error := task.exception()) is not None]

"""One job on this worker: its engine, its connections and its running groups."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.drafts.initial import ensure_initial
from miles.extensions.arguments import args_of
from miles.extensions.samples import renderer_of
from miles.queue import GroupQueue, PartialStore, ResponseStore, connect_async
from miles.rpc.gen import rollout_pb2
from miles.services.rollout.engines.base import PauseMode, RolloutEngine
from miles.services.rollout.engines.sglang.requests.continuation import read_end_tokens
from miles.services.rollout.functions.sampler import FunctionSampler, FunctionTools
from miles.services.rollout.functions.setup import generate_by_function
from miles.services.rollout.groups.earlier_responses import EarlierResponses, PromptDrafts
from miles.services.rollout.groups.filters import load_filter
from miles.services.rollout.groups.group_run import GroupTools
from miles.services.rollout.groups.messages import GroupLease
from miles.services.rollout.groups.requests import GroupRequests
from miles.services.rollout.groups.response_sampler import Sampler, SingleTurnSampler
from miles.services.rollout.groups.response_text import response_decoder
from miles.services.rollout.groups.running_groups import RunningGroups
from miles.services.rollout.groups.scoring import JobRewards
from miles.services.rollout.groups.waits import queue_waits, reward_waits, teacher_waits
from miles.services.rollout.serving.readiness import Serving
from miles.services.rollout.serving.subscriptions import subscribe_draft, subscribe_policy
from miles.services.rollout.speculation_progress import speculation_progress
from miles.services.rollout.stages import report_stage
from miles.services.rollout.teachers.served import PROBE, ServedTeachers

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.reward_sdk.client import RewardClient
    from miles.weights.adapters.merging import AdapterBase

log = logging.getLogger(__name__)

TICK_S = 0.5


class RolloutJob:
    """What this worker holds for one job. `start` it once, then lease groups to `groups`; `close` it."""

    def __init__(
        self,
        job_id: str,
        config: JobConfig,
        *,
        redis_url: str,
        weightsync_address: str,
        reward_addresses: Mapping[str, str],
        worker_id: str,
        device: str | None = None,
        engine_addresses: Sequence[str] = (),
    ) -> None:
        """Without a `weightsync_address` the engine serves the checkpoint's own weights as version 0.

        `engine_addresses`: SGLang servers of this worker, when not all that the configuration lists are.
        """
        self.job_id = job_id
        self.config = config
        self.origin = (config, redis_url, weightsync_address, dict(reward_addresses))
        """What the job was built from; jobs with equal origins are the same job."""
        self._redis_url = redis_url
        self._weightsync_address = weightsync_address
        self._reward_addresses = dict(reward_addresses)
        self._worker_id = worker_id
        self._device = device or config.services.device
        self._engine_addresses = tuple(engine_addresses) or config.rollout.rollout_external_engine_addrs or ()
        self._closing = contextlib.AsyncExitStack()
        self._teachers: ServedTeachers | None = None
        self._listeners: list[Callable[[], None]] = []
        self._function: FunctionTools | None = None
        self._earlier: EarlierResponses | None = None
        self.engine: RolloutEngine
        self.serving: Serving
        self.groups: RunningGroups

    @property
    def capacity_groups(self) -> int:
        """Groups the engine can usefully hold at once; 0 while it is out of routing or has no weights yet.

        Twice what fills its slots, so that some groups keep the slots busy while others end or wait for rewards.
        Further groups are assumed to be as big as those that run, so that small ones (evaluation) fill the slots too.
        """
        if self.serving.quarantine_reason or self.serving.gate.version is None:
            return 0
        held = self.groups.sizes
        usual = sum(held) / len(held) if held else self.config.data.n_samples_per_prompt
        free = max(0, 2 * self.engine.max_running_requests - sum(held))
        return len(held) + math.ceil(free / usual)

    async def start(self) -> AsyncGenerator[str, None]:
        """Build and connect everything, yielding each stage before it begins. After an error nothing is left open."""
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._closing.aclose)
            async with contextlib.aclosing(self._start()) as stages:
                async for stage in stages:
                    log.info("job %s: %s", self.job_id, stage)
                    yield stage
            undo.pop_all()
        # What a job holds from here on stays until its end. Collections of garbage would look through all of it, which
        # takes as long as some dozen groups.
        gc.collect()
        gc.freeze()

    async def _start(self) -> AsyncGenerator[str, None]:

        rollout = self.config.rollout
        yield "connecting to the sample queue"
        redis = await connect_async(self._redis_url)
        self._closing.push_async_callback(redis.aclose)
        yield "loading the tokenizer"
        tokenizer = await asyncio.to_thread(_tokenizer, self.config)
        decode = response_decoder(tokenizer, read_end_tokens(str(rollout.hf_checkpoint)))
        teachers = None
        if self.config.distillation.teacher_urls:
            teachers = self._teachers = ServedTeachers(self.config.distillation)
            await teachers.open()
            self._closing.push_async_callback(teachers.close)
            probe = tokenizer.encode(PROBE, add_special_tokens=False)
            asked = " and ".join(map(str, teachers.servers.values()))
            async with contextlib.aclosing(report_stage(f"waiting for {asked}", teachers.check(probe))) as reports:
                async for report in reports:
                    yield report
        group_filter = None
        if rollout.dynamic_sampling_filter_path is not None:
            group_filter = load_filter(
                rollout.dynamic_sampling_filter_path,
                args_of(self.config.to_flat()),
                renderer_of(self.config, tokenizer),
            )
        self.engine = await asyncio.to_thread(self._create_engine)
        # Before it starts: the caller may be gone by the time the engine is ready.
        self._closing.push_async_callback(self.engine.close)
        async with contextlib.aclosing(
            report_stage(f"building the {rollout.rollout_backend} engine", self.engine.start())
        ) as reports:
            async for report in reports:
                yield report
        mode = PauseMode(self.config.weights.pause_generation_mode)
        self.serving = Serving(self.engine, self._on_serving_change, update_mode=mode)
        yield "connecting to rewards and weights"
        if self.config.extensions.custom_generate_function_path is not None:
            serving = generate_by_function(self.config, tokenizer, lambda: self.serving.gate.version or 0)
            self._function = await self._closing.enter_async_context(serving)
        self._rewards = self._connect_rewards()
        if per_prompt := self.config.drafts.draft_responses_per_prompt:
            responses = ResponseStore(redis, self.job_id, per_prompt=per_prompt)
            await responses.fit_server()
            self._earlier = EarlierResponses(responses)
            self._closing.push_async_callback(self._earlier.close)
        self._queue = GroupQueue(redis, self.job_id)
        tools = GroupTools(
            job_id=self.job_id,
            config=self.config,
            create_sampler=self._create_sampler,
            gate=self.serving.gate,
            decode=decode,
            rewards=JobRewards(
                self._rewards, self.config.reward, optional=self.config.distillation.rewards_are_optional
            ),
            queue=self._queue,
            partials=PartialStore(redis, self.job_id),
            teachers=teachers,
            group_filter=group_filter,
            earlier=self._earlier,
        )
        self.groups = RunningGroups(tools, self._worker_id, self._notify)
        ticker = asyncio.create_task(self._tick(), name=f"ticks of job {self.job_id}")
        self._closing.callback(ticker.cancel)
        if self._weightsync_address and not self.config.lora.lora_rank:
            await self._subscribe(None)
            return
        if self._weightsync_address:
            stage, work = "reading the base of adapters", self._subscribe_with_base()
        else:
            stage, work = "loading the checkpoint's weights", self._load_checkpoint()
        async with contextlib.aclosing(report_stage(stage, work)) as reports:
            async for report in reports:
                yield report

    def _create_engine(self) -> RolloutEngine:
        ensure_initial(self.config)
        # In a thread: importing an engine imports torch, which takes seconds.
        from miles.services.rollout.engines.registry import configured_engine

        return configured_engine(
            self.config, device=self._device, name=self._worker_id, engine_addresses=self._engine_addresses
        )

    def _create_sampler(self, lease: GroupLease) -> Sampler:
        record_experts = self.config.rollout.records_routing
        top_tokens = self.config.distillation.engine_top_k
        drafts = None
        if self._earlier is not None:
            drafts = PromptDrafts(self._earlier, lease.group.samples[0].prompt_tokens)
        requests = GroupRequests(
            self.engine, lease, record_experts=record_experts, top_tokens=top_tokens, drafts=drafts
        )
        if self._function is not None:
            return FunctionSampler(self._function, requests, lease)
        return SingleTurnSampler(requests)

    def _connect_rewards(self) -> RewardClient:
        from miles.reward_sdk.client import RewardClient

        reward = self.config.reward
        client = RewardClient(self._reward_addresses, timeout_s=reward.reward_timeout_s, retries=reward.reward_retries)
        self._closing.push_async_callback(client.close)
        return client

    def _read_base(self) -> AdapterBase:
        import torch

        from miles.services.rollout.engines.checkpoint_weights import read_weights
        from miles.weights.adapters.merging import AdapterBase
        from miles.weights.naming.published import published_tensors

        rollout = self.config.rollout
        published = published_tensors(self.config)
        device = self.engine.device if self.engine.spec.adapter_base_on_device else torch.device("cpu")
        weights = read_weights(str(rollout.hf_checkpoint), rollout.rollout_dtype)
        return AdapterBase(weights, device, published.from_module)

    async def _subscribe_with_base(self) -> None:
        await self._subscribe(await asyncio.to_thread(self._read_base))

    async def _subscribe(self, base: AdapterBase | None) -> None:
        stream = (self._weightsync_address, self.job_id, self._worker_id)
        subscriber = await subscribe_policy(*stream, self.engine, self.serving, base)
        self._closing.push_async_callback(subscriber.close)
        if self.engine.draft is not None:
            subscriber = await subscribe_draft(*stream, self.engine.draft)
            self._closing.push_async_callback(subscriber.close)

    async def _load_checkpoint(self) -> None:
        from miles.services.rollout.engines.checkpoint_weights import read_published

        await self.serving.load_weights(0, await asyncio.to_thread(read_published, self.config))
        self.serving.serve(0)

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` whenever `capacity_groups` may have changed, until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def progress(self) -> rollout_pb2.RunProgress:
        """The engine's counters now."""
        stats = self.engine.stats()
        return rollout_pb2.RunProgress(
            running_requests=stats.running_requests,
            waiting_requests=stats.waiting_requests,
            generated_tokens=stats.generated_tokens,
            busy_s=stats.busy_s,
            version=self.serving.gate.version,
            waits=[
                *reward_waits(
                    self._rewards.waits(), self._rewards.patience_s, self.config.reward.reward_failure_policy
                ),
                *teacher_waits(() if self._teachers is None else self._teachers.servers.values()),
                *queue_waits(self._queue.waiting),
            ],
            speculation=None if stats.speculation is None else speculation_progress(stats.speculation, self._earlier),
        )

    async def close(self) -> None:
        """Preempt all groups, wait until they are stored, and release everything."""
        await self.groups.preempt_and_wait()
        await self._closing.aclose()
        gc.unfreeze()

    def _on_serving_change(self) -> None:
        if self.serving.quarantine_reason:
            self.groups.preempt_all()
        self._notify()

    def _notify(self) -> None:
        for listener in list(self._listeners):
            listener()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.serving.tick()
            self._notify()  # the capacity of an engine of several servers changes as they come and go


def _tokenizer(config: JobConfig) -> Any:
    from miles.data.template import load_tokenizer

    return load_tokenizer(str(config.rollout.hf_checkpoint), config.data.chat_template_path)

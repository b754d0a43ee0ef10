"""One job on this worker: its engine, its connections, and the groups it is generating."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.queue import GroupQueue, Holder, PartialStore, connect_async
from miles.rpc.gen import policy_pb2, rollout_pb2
from miles.services.rollout.engines.base import PauseMode, RolloutEngine
from miles.services.rollout.groups.filters import load_filter
from miles.services.rollout.groups.messages import Lease, Outcome, Purpose
from miles.services.rollout.groups.runner import GroupRun, GroupTools
from miles.services.rollout.groups.scoring import Scorer
from miles.services.rollout.serving.readiness import Serving

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.reward_sdk.client import RewardClient
    from miles.weights.adapters.merging import AdapterBase
    from miles.weights.engine_weights import WeightTarget
    from miles.weights.subscriber import SubscriberState

log = logging.getLogger(__name__)

CLOSE_DEADLINE_S = 60.0
"""How long running groups may take to store what they have when the job ends here."""

TELL_EVERY_S = 60.0

Deliver = Callable[[Lease, Outcome], None]


class RolloutJob:
    """What this worker holds for one job. `start` once, then hand it leases; `close` it."""

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
        """What the job was built from; a job built from the same is the same."""
        self._redis_url = redis_url
        self._weightsync_address = weightsync_address
        self._reward_addresses = dict(reward_addresses)
        self._worker_id = worker_id
        self._device = device or config.services.device
        self._engine_addresses = tuple(engine_addresses) or config.rollout.rollout_external_engine_addrs or ()
        self._runs: dict[tuple[Purpose, int], tuple[GroupRun, asyncio.Task[None]]] = {}
        self._closing = contextlib.AsyncExitStack()
        self._listeners: list[Callable[[], None]] = []
        self.engine: RolloutEngine
        self.serving: Serving
        self._tools: GroupTools

    @property
    def capacity_groups(self) -> int:
        """Groups the engine can usefully hold at once; 0 while it is out of routing or has no weights yet.

        Twice what fills its slots: while some groups run out or wait for rewards, others keep the slots busy. Groups to
        come are taken to be as big as those that run, so that small ones (evaluation) fill the slots too.
        """
        if self.serving.quarantine_reason or self.serving.gate.version is None:
            return 0
        held = [len(run.lease.group.samples) for run, _ in self._runs.values()]
        usual = sum(held) / len(held) if held else self.config.data.n_samples_per_prompt
        free = max(0, 2 * self.engine.max_running_requests - sum(held))
        return len(held) + math.ceil(free / usual)

    async def start(self) -> AsyncGenerator[str, None]:
        """Build and connect everything, yielding each stage before it begins. On an error nothing stays behind."""
        try:
            async with contextlib.aclosing(self._start()) as stages:
                async for stage in stages:
                    log.info("job %s: %s", self.job_id, stage)
                    yield stage
        except BaseException:
            await self._closing.aclose()
            raise

    async def _start(self) -> AsyncGenerator[str, None]:
        rollout = self.config.rollout
        yield "connecting to the sample queue"
        redis = await connect_async(self._redis_url)
        self._closing.push_async_callback(redis.aclose)
        yield "loading the tokenizer"
        decode = await asyncio.to_thread(_decoder, str(rollout.hf_checkpoint))
        group_filter = None
        if rollout.dynamic_sampling_filter_path is not None:
            group_filter = load_filter(rollout.dynamic_sampling_filter_path)
        self.engine = await asyncio.to_thread(self._create_engine)
        # Before it starts: whoever asked for the job may be gone at the moment when the engine is ready.
        self._closing.push_async_callback(self.engine.close)
        async with contextlib.aclosing(
            telling(f"building the {rollout.rollout_backend} engine", self.engine.start())
        ) as words:
            async for word in words:
                yield word
        mode = PauseMode(self.config.weights.pause_generation_mode)
        self.serving = Serving(self.engine, self._on_serving_change, update_mode=mode)
        yield "connecting to rewards and weights"
        self._tools = GroupTools(
            job_id=self.job_id,
            config=self.config,
            engine=self.engine,
            gate=self.serving.gate,
            decode=decode,
            scorer=Scorer(self._connect_rewards(), self.config.reward),
            queue=GroupQueue(redis, self.job_id),
            partials=PartialStore(redis, self.job_id),
            group_filter=group_filter,
        )
        ticker = asyncio.create_task(self._tick(), name=f"ticks of job {self.job_id}")
        self._closing.callback(ticker.cancel)
        if self._weightsync_address and not self.config.lora.lora_rank:
            await self._subscribe(None)
            return
        if self._weightsync_address:
            stage, work = "reading the base of adapters", self._subscribe_with_base()
        else:
            stage, work = "loading the checkpoint's weights", self._load_checkpoint()
        async with contextlib.aclosing(telling(stage, work)) as words:
            async for word in words:
                yield word

    def _create_engine(self) -> RolloutEngine:
        # In a thread: importing an engine imports torch, which takes seconds.
        from miles.services.rollout.engines import configured_engine

        return configured_engine(
            self.config, device=self._device, name=self._worker_id, engine_addresses=self._engine_addresses
        )

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

        rollout = self.config.rollout
        device = self.engine.device if self.engine.spec.adapter_base_on_device else torch.device("cpu")
        return AdapterBase(read_weights(str(rollout.hf_checkpoint), rollout.rollout_dtype), device)

    async def _subscribe_with_base(self) -> None:
        await self._subscribe(await asyncio.to_thread(self._read_base))

    async def _subscribe(self, base: AdapterBase | None) -> None:
        from miles.weights.subscriber import SubscriberState, WeightSubscriber

        def on_change(state: SubscriberState) -> None:
            if state is SubscriberState.QUARANTINED:
                self.serving.quarantine(f"weights: {subscriber.last_error}")
            elif subscriber.version is not None:
                self.serving.admit(subscriber.version)

        stream = policy_pb2.WEIGHT_STREAM_POLICY
        subscriber = WeightSubscriber(
            *(self._weightsync_address, self.job_id, self._worker_id, stream, self.serving),
            on_change=on_change,
            create_receiver=self.engine.create_receiver,
            base=base,
        )
        await subscriber.start()
        self._closing.push_async_callback(subscriber.close)
        if self.engine.draft is not None:
            await self._subscribe_draft(self.engine.draft)

    async def _subscribe_draft(self, draft: WeightTarget) -> None:
        """Follow the draft's versions too. They decide how fast responses come and nothing else: no gate waits."""
        from miles.weights.subscriber import SubscriberState, WeightSubscriber

        def on_change(state: SubscriberState) -> None:
            if state is SubscriberState.QUARANTINED:
                log.warning("job %s: the draft model is not what it should be: %s", self.job_id, subscriber.last_error)

        stream = policy_pb2.WEIGHT_STREAM_DRAFT
        subscriber = WeightSubscriber(
            *(self._weightsync_address, self.job_id, self._worker_id, stream, draft), on_change=on_change
        )
        await subscriber.start()
        self._closing.push_async_callback(subscriber.close)

    async def _load_checkpoint(self) -> None:
        from miles.services.rollout.engines.checkpoint_weights import read_weights

        rollout = self.config.rollout
        weights = await asyncio.to_thread(read_weights, str(rollout.hf_checkpoint), rollout.rollout_dtype)
        await self.serving.load_weights(0, weights)
        self.serving.admit(0)

    def lease(self, lease: Lease, deliver: Deliver, lease_number: int) -> None:
        """Begin a group; `deliver` gets what comes of it, unless it raised a bug, which is logged.

        `lease_number` is the worker's own lease, under which the group was handed out. A group that is leased again
        while it still runs is given up first.
        """
        key = (lease.purpose, lease.group_id)
        before = self._runs.get(key)
        run = GroupRun(lease, self._tools, Holder(self._worker_id, lease_number))

        async def carry_out() -> None:
            if before is not None:
                before[0].give_up()
                await asyncio.wait([before[1]])
            try:
                deliver(lease, await run.run())
            finally:
                if self._runs.get(key, (None,))[0] is run:
                    del self._runs[key]
                    self._notify()

        task = asyncio.create_task(carry_out(), name=f"group {lease.group_id} of job {self.job_id}")
        task.add_done_callback(_log_bug)
        self._runs[key] = (run, task)
        self._notify()

    def give_up(self, group_id: int, attempt: int, purpose: Purpose | None = None) -> None:
        """Give up one group, if that attempt of it runs; without a purpose, whatever it runs for."""
        for run, _ in self._runs.values():
            lease = run.lease
            if (lease.group_id, lease.attempt) == (group_id, attempt) and purpose in (None, lease.purpose):
                run.give_up()

    def give_up_all(self) -> None:
        """Give up every group."""
        for run, _ in self._runs.values():
            run.give_up()

    async def settle(self, deadline_s: float = CLOSE_DEADLINE_S) -> None:
        """Give up every group and wait until each has stored what it has."""
        self.give_up_all()
        tasks = [task for _, task in self._runs.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=deadline_s)
            for task in late:
                log.warning("%s did not end within %.0f s; what it has is lost", task.get_name(), deadline_s)
                task.cancel()

    def listen(self, listener: Callable[[], None]) -> None:
        """Have `listener` called whenever `capacity_groups` may have changed."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Undo `listen`."""
        self._listeners.remove(listener)

    def progress(self) -> rollout_pb2.RunProgress:
        """Counters as of now."""
        stats = self.engine.stats()
        return rollout_pb2.RunProgress(
            running_requests=stats.running_requests,
            waiting_requests=stats.waiting_requests,
            generated_tokens=stats.generated_tokens,
            busy_s=stats.busy_s,
            version=self.serving.gate.version,
        )

    async def close(self) -> None:
        """Give up all groups, storing what they have, and let go of everything."""
        await self.settle()
        await self._closing.aclose()

    def _on_serving_change(self) -> None:
        if self.serving.quarantine_reason:
            self.give_up_all()
        self._notify()

    def _notify(self) -> None:
        for listener in list(self._listeners):
            listener()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.serving.tick()
            self._notify()  # an engine of several servers takes more or less as they come and go


async def telling(
    stage: str, work: Coroutine[Any, Any, None], every_s: float = TELL_EVERY_S
) -> AsyncGenerator[str, None]:
    """Carry out `work`, saying now and then that it goes on: whoever started the job takes long silence for death."""
    began = time.monotonic()
    task = asyncio.create_task(work)
    try:
        yield stage
        while not (await asyncio.wait({task}, timeout=every_s))[0]:
            yield f"{stage}, for {time.monotonic() - began:.0f} s now"
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _decoder(hf_checkpoint: str) -> Callable[[Sequence[int], bool], str]:
    from miles.data.template import load_tokenizer

    tokenizer = load_tokenizer(hf_checkpoint)

    def decode(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    return decode


def _log_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended with an error that is a bug", task.get_name(), exc_info=error)

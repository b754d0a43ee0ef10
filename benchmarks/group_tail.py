"""What a step's groups cost once their responses have ended: text, rewards, checks, the queue.

    python -m benchmarks.group_tail
    python -m benchmarks.group_tail --profile
    python -m benchmarks.group_tail --tokens 256 --events routing

32 groups of 8 samples of 16 tokens, whose responses all end at the same moment, as those of a batch on a GPU do. The
groups run in this process, as in a rollout service, with a stand-in for the engine; reward service and Redis are real
and have processes of their own. `last group`: from that moment until the last outcome is delivered. `this process`:
what its event loop and gRPC's threads computed meanwhile. With `--profile`, the functions of the event loop follow.
With `--events` each response also comes as the bytes of an event of SGLang, which is decoded: a plain one, or one with
the routed experts of 8 layers, 4 of 32 a token.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import cProfile
import dataclasses
import json
import pathlib
import pstats
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import numpy as np
import orjson

from benchmarks.gpu.rollout_client import reward_service
from miles.config import JobConfig
from miles.queue import GroupQueue, PartialStore, RedisServer, connect_async
from miles.reward_sdk.client import RewardClient
from miles.services.controller.run.lease_messages import training_lease
from miles.services.rollout.engines.base import FinishReason, GenerationDelta, GenerationRequest, GenerationResult
from miles.services.rollout.engines.sglang.requests.events import EventSplitter
from miles.services.rollout.engines.sglang.requests.responses import ResponseDecoder
from miles.services.rollout.groups.group_run import GroupTools
from miles.services.rollout.groups.messages import Finished, GroupLease, Outcome, lease_from_proto, outcome_to_proto
from miles.services.rollout.groups.requests import GroupRequests
from miles.services.rollout.groups.response_sampler import SingleTurnSampler
from miles.services.rollout.groups.running_groups import RunningGroups
from miles.services.rollout.groups.scoring import JobRewards
from miles.services.rollout.serving.version_gate import VersionGate
from miles.types import Sample, SampleGroup, VersionSpan
from miles.types.experts import ExpertLayout

JOB = "bench"
PROMPT_TOKENS = 64
WARM_UPS = 15
PIECE_BYTES = 1 << 16
"""Of a response's body that come at once."""
LAYOUT = ExpertLayout(8, tuple(range(8)), 4, 32)


class StandIn:
    """Ends every response when it is told to."""

    def __init__(self, tokens: int, events: str) -> None:
        self.asked = 0
        self.end = asyncio.Event()
        self._experts = LAYOUT if events == "routing" else None
        self._event = event_of(tokens, self._experts) if events else b""
        self._delta = GenerationDelta(
            list(range(300, 300 + tokens)),
            [-1.0] * tokens,
            GenerationResult(FinishReason.LENGTH, (VersionSpan(0, 0, tokens),)),
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """One delta, at the end."""
        self.asked += 1
        await self.end.wait()
        if not self._event:
            yield self._delta
            return
        splitter = EventSplitter()
        for begin in range(0, len(self._event), PIECE_BYTES):
            for data in splitter.feed(self._event[begin : begin + PIECE_BYTES]):
                decoder = ResponseDecoder(len(request.input_ids), self._experts)
                yield await decoder.decode_apart(orjson.loads(data))

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Never called."""


def event_of(tokens: int, layout: ExpertLayout | None) -> bytes:
    """The event with which SGLang ends a response, as it is sent."""
    rng = np.random.default_rng(0)
    ids = rng.integers(300, 30000, tokens).tolist()
    meta = {
        "id": "bench-00000000-000000000000",
        "finish_reason": {"type": "length", "length": tokens},
        "prompt_tokens": PROMPT_TOKENS,
        "weight_version": "0",
        "num_retractions": 0,
        "output_token_logprobs": [[-float(x), i, None] for x, i in zip(rng.random(tokens) * 10, ids, strict=True)],
        "completion_tokens": tokens,
        "cached_tokens": PROMPT_TOKENS - 1,
    }
    if layout is not None:
        shape = (PROMPT_TOKENS + tokens - 1, layout.layers, layout.top_k)
        experts = rng.integers(0, layout.experts, shape, np.int32)
        meta["routed_experts"] = base64.b64encode(experts.tobytes()).decode()
    event = {"text": "word " * tokens, "output_ids": ids, "meta_info": meta, "index": 0}
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--groups", type=int, default=32)
    add("--samples", type=int, default=8)
    add("--tokens", type=int, default=16)
    add("--rounds", type=int, default=30)
    add("--events", default="", choices=["", "plain", "routing"], help="decode each response from an event of SGLang")
    add("--profile", action="store_true")
    asyncio.run(measure(parser.parse_args()))


async def measure(args: argparse.Namespace) -> None:
    """Run the rounds."""
    config = JobConfig.from_flat(
        {
            "hf_checkpoint": "model",
            "prompt_data": "none.jsonl",
            "label_key": "label",
            "num_rollout": 1,
            "rollout_batch_size": args.groups,
            "n_samples_per_prompt": args.samples,
            "rollout_max_response_len": args.tokens,
            "rm_type": "exact_match",
            "lr": 1e-6,
            "rollout_backend": "sglang",
            "use_rollout_routing_replay": args.events == "routing",
        }
    )
    took, computed = [], []
    profile = cProfile.Profile()
    async with group_tools(config) as tools:
        for number in range(WARM_UPS + args.rounds):
            if args.profile and number >= WARM_UPS:
                seconds = await one_round(args, config, tools, number, profile)
            else:
                seconds = await one_round(args, config, tools, number)
            took.append(seconds[0])
            computed.append(seconds[1])
    print(f"{args.groups} groups x {args.samples} samples x {args.tokens} tokens; ms")
    print(f"{'':<14}{'median':>9}{'smallest':>10}{'largest':>9}")
    for title, each in (("last group", took[WARM_UPS:]), ("this process", computed[WARM_UPS:])):
        print(f"{title:<14}{statistics.median(each) * 1e3:>9.1f}{min(each) * 1e3:>10.1f}{max(each) * 1e3:>9.1f}")
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45).sort_stats("cumtime").print_stats(60)


@contextlib.asynccontextmanager
async def group_tools(config: JobConfig) -> AsyncIterator[GroupTools]:
    """What the groups share; its sampler is set by each round."""
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="group-tail-"))
        server = stack.enter_context(RedisServer(pathlib.Path(folder) / "redis"))
        redis = await connect_async(server.url)
        stack.push_async_callback(redis.aclose)
        rewards = RewardClient({"default": await stack.enter_async_context(reward_service())})
        stack.push_async_callback(rewards.close)
        gate = VersionGate()
        gate.open(0)
        yield GroupTools(
            job_id=JOB,
            config=config,
            create_sampler=no_sampler,
            gate=gate,
            decode=lambda tokens, _: " ".join(map(str, tokens)),
            rewards=JobRewards(rewards, config.reward),
            queue=GroupQueue(redis, JOB),
            partials=PartialStore(redis, JOB),
        )


def no_sampler(lease: GroupLease) -> SingleTurnSampler:
    """Replaced in each round."""
    raise NotImplementedError


async def one_round(
    args: argparse.Namespace, config: JobConfig, tools: Any, number: int, profile: cProfile.Profile | None = None
) -> tuple[float, float]:
    """Run the groups of a round; returns seconds from the end of the responses on, and what this process computed."""
    engine: Any = StandIn(args.tokens, args.events)
    record_experts = args.events == "routing"
    tools = dataclasses.replace(
        tools,
        create_sampler=lambda lease: SingleTurnSampler(GroupRequests(engine, lease, record_experts=record_experts)),
    )
    groups = RunningGroups(tools, "bench", lambda: None)
    outcomes: list[Outcome] = []
    done = asyncio.Event()

    def deliver(lease: GroupLease, outcome: Outcome) -> None:
        outcome_to_proto(lease.group_id, lease.attempt, lease.purpose, outcome, 1)
        outcomes.append(outcome)
        if len(outcomes) == args.groups:
            done.set()

    for group_id in range(number * args.groups, (number + 1) * args.groups):
        sample = Sample(
            group_id=group_id,
            index=0,
            prompt="p",
            tokens=np.arange(300, 300 + PROMPT_TOKENS, dtype=np.int32),
            label="1",
        )
        lease = training_lease(config, SampleGroup(JOB, group_id, [sample]), 1, 0, 0)
        groups.start(lease_from_proto(lease), deliver, 1)
    while engine.asked < args.groups * args.samples:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    began, computed = time.perf_counter(), time.process_time()
    if profile is not None:
        profile.enable()
    engine.end.set()
    await done.wait()
    if profile is not None:
        profile.disable()
    seconds = time.perf_counter() - began, time.process_time() - computed
    assert all(isinstance(outcome, Finished) for outcome in outcomes), outcomes
    return seconds


if __name__ == "__main__":
    main()

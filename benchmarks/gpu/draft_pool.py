"""Steady decoding: a pool of requests in which the next begins as one ends, on an engine with drafts or without."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.draft_head import TEMPLATE
from benchmarks.gpu.draft_tasks import TASKS
from miles.services.rollout.engines.base import GenerationRequest, SamplingParams, SpeculationCounts
from miles.services.rollout.engines.checkpoint_weights import read_weights
from miles.services.rollout.engines.registry import create_engine

WARM_UP_S = 2.0
WARM_TOKENS = 16
"""Of each request, before a pool of a new size is known to decode without compiling anything."""
WARM_DEADLINE_S = 120.0


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """A measurement."""

    policy: str
    draft: str
    size: int
    tokens_per_s: float
    accept_length: float
    """Tokens of a verification."""


class Pool:
    """An engine and the requests that it is kept busy with."""

    def __init__(self, args: argparse.Namespace, name: str, flags: Mapping[str, Any]) -> None:
        from transformers import AutoTokenizer

        options: dict[str, Any] = {"hf_checkpoint": str(args.policy), "device": args.device, "dtype": args.dtype}
        if args.engine == "sglang":
            options |= {"python": args.python, "server_flags": flags, "log_dir": args.runs.absolute() / "logs"}
            options |= {"name": name, "random_seed": 7}
        elif flags:
            from miles.config.speculation import speculation_of

            options["speculation"] = speculation_of(flags)
        self._engine: Any = create_engine(args.engine, **options)
        self._args = args
        self.sizes: list[int] = args.pools
        """Of its pools."""
        self._name = name
        self._numbers = itertools.count()
        """Of the requests of a pool: prompts and seeds, so that all drafts answer the same."""
        self._ids = itertools.count()
        self._versions = itertools.count(1)
        self._tokens = 0
        self._awaited = 0
        self._enough = asyncio.Event()
        tokenizer = AutoTokenizer.from_pretrained(args.policy)
        texts = TASKS[args.task].texts(512, 3)
        self._prompts = [tokenizer.encode(TEMPLATE.format(text), add_special_tokens=False) for text in texts]

    async def start(self) -> None:
        """Start the engine."""
        began = time.monotonic()
        await self._engine.start()
        print(f"{self._name} started after {time.monotonic() - began:.0f} s", flush=True)

    async def warm_up(self) -> None:
        """Decode with pools of all sizes, since kernels are compiled at first use; a policy has to be loaded."""
        began = time.monotonic()
        for size in self.sizes:
            pool = await self._begin(size)
            async with asyncio.timeout(WARM_DEADLINE_S):
                await self._counted(size * WARM_TOKENS)
            await self._end(pool)
        print(f"{self._name} warm after another {time.monotonic() - began:.0f} s", flush=True)

    async def close(self) -> None:
        """Stop it."""
        await self._engine.close()

    async def load(self, weights: Mapping[str, Any]) -> None:
        """Load a policy."""
        pause = await self._engine.load_weights(next(self._versions), weights)
        print(f"{self._name}: policy loaded, pause {pause:.3f} s", flush=True)

    async def load_draft(self, weights: Mapping[str, Any]) -> dict[str, float]:
        """Load a head while requests decode; what it cost."""
        pool = await self._begin(min(32, max(self._args.pools)))
        await asyncio.sleep(WARM_UP_S)
        pause = await self._engine.draft.load_weights(next(self._versions), weights)
        await self._end(pool)
        return {"pause_s": pause, "gigabytes": sum(each.nbytes for each in weights.values()) / 1e9}

    async def measure(self, policy: str, draft: str, size: int) -> Reading:
        """Keep a pool of this size busy, and count after it has warmed up."""
        pool = await self._begin(size)
        await asyncio.sleep(WARM_UP_S)
        before, tokens, began = self._counts(), self._tokens, time.monotonic()
        await asyncio.sleep(self._args.seconds)
        rate = (self._tokens - tokens) / (time.monotonic() - began)
        await self._end(pool)
        accepted, verified = (now - then for now, then in zip(self._counts(), before, strict=True))
        reading = Reading(policy, draft, size, rate, 1 + accepted / max(verified, 1))
        print(reading, flush=True)
        return reading

    async def _counted(self, tokens: int) -> None:
        """Wait for so many more tokens."""
        self._enough.clear()
        self._awaited = self._tokens + tokens
        await self._enough.wait()

    async def _begin(self, size: int) -> list[asyncio.Task[None]]:
        self._numbers = itertools.count()
        return [asyncio.create_task(self._keep_busy()) for _ in range(size)]

    async def _end(self, pool: list[asyncio.Task[None]]) -> None:
        for task in pool:
            task.cancel()
        await asyncio.gather(*pool, return_exceptions=True)
        await self._engine.abort()

    async def _keep_busy(self) -> None:
        while True:
            number = next(self._numbers)
            sampling = SamplingParams(max_new_tokens=self._args.tokens, temperature=self._args.temperature, seed=number)
            prompt = self._prompts[number % len(self._prompts)]
            request = GenerationRequest(f"{self._name}-{next(self._ids)}", prompt, sampling)
            async for delta in self._engine.generate(request):
                self._tokens += len(delta.token_ids)
                if self._tokens >= self._awaited:
                    self._enough.set()

    def _counts(self) -> tuple[int, int]:
        """Drafts accepted and verifications so far."""
        state = self._engine.stats().speculation
        counts: tuple[SpeculationCounts, ...] = () if state is None else state.counts
        return sum(each.accepted_draft_tokens for each in counts), sum(each.verify_count for each in counts)


def policy_weights(folder: pathlib.Path, dtype: str) -> dict[str, Any]:
    """A policy's tensors as engines load them."""
    return read_weights(str(folder), dtype)


def draft_weights(folder: pathlib.Path, dtype: str) -> dict[str, Any]:
    """A head's tensors as the draft stream brings them."""
    import torch

    from miles.drafts.folder import read_tensors

    kind = getattr(torch, dtype)
    tensors = read_tensors(folder).items()
    return {name: tensor.to(kind) for name, tensor in tensors if name.split(".")[-1] not in ("d2t", "t2d")}

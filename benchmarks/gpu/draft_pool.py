"""An engine with drafts or without, kept busy by requests: batches, or a pool in which the next begins as one ends."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.draft_head import TEMPLATE
from benchmarks.gpu.draft_tasks import TASKS
from miles.services.rollout.engines.base import GenerationRequest, SamplingParams, SpeculationCounts
from miles.services.rollout.engines.checkpoint_weights import read_weights
from miles.services.rollout.engines.registry import create_engine

LOADS = ("batches", "refilled")
"""Requests that begin at once, counted until a quarter of them has ended, and again when the last has; and a pool in
which the next begins as one ends, as in asynchronous runs, where each prefill makes the others wait."""
WARM_UP_S = 2.0
WARM_TOKENS = 16
"""Of each request, before a pool of a new size is known to decode without compiling anything."""
WARM_DEADLINE_S = 120.0


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """A measurement."""

    load: str
    policy: str
    draft: str
    size: int
    tokens_per_s: float
    accept_length: float
    """Tokens of a verification."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """A response."""

    began: float
    ended: float
    """By time.monotonic()."""
    tokens: int

    def tokens_between(self, start: float, end: float) -> float:
        """As if they had come evenly."""
        return self.tokens * max(0.0, min(self.ended, end) - max(self.began, start)) / (self.ended - self.began)


def while_most_run(batch: Sequence[Ended]) -> tuple[float, float]:
    """Tokens of a batch before a quarter of its responses has ended, and the seconds from its beginning until then.

    With drafts responses of the same length end at different times, and the last ones are alone at the end: that says
    what the slowest of so many takes, and not how fast so many are.
    """
    began = min(each.began for each in batch)
    until = sorted(each.ended for each in batch)[len(batch) // 4]
    return sum(each.tokens_between(began, until) for each in batch), until - began


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
        """Numbers of requests at a time."""
        self.loads: Sequence[str] = args.loads
        self._name = name
        self._numbers = itertools.count()
        """Of the requests of a pool: prompts and seeds, so that all drafts answer the same."""
        self._ids = itertools.count()
        self._versions = itertools.count(1)
        self._tokens = 0
        self._awaited = 0
        self._enough = asyncio.Event()
        self._ended: list[Ended] = []
        self._last = False
        """Whether requests that end are the last ones."""
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

    async def measure(self, load: str, policy: str, draft: str, size: int) -> Reading:
        """Tokens per second under a load of this size."""
        before = self._counts()
        rate = await (self._batches(size) if load == "batches" else self._refilled(size))
        accepted, verified = (now - then for now, then in zip(self._counts(), before, strict=True))
        reading = Reading(load, policy, draft, size, rate, 1 + accepted / max(verified, 1))
        print(reading, flush=True)
        return reading

    async def _batches(self, size: int) -> float:
        """Of the batches that begin in the seconds, from the first prefill on and while most requests run."""
        self._numbers = itertools.count()
        tokens, seconds, began = 0.0, 0.0, time.monotonic()
        while time.monotonic() - began < self._args.seconds:
            self._ended.clear()
            await asyncio.gather(*(self._answer(self._args.tokens) for _ in range(size)))
            more = while_most_run(self._ended)
            tokens, seconds = tokens + more[0], seconds + more[1]
        return tokens / seconds

    async def _refilled(self, size: int) -> float:
        """After a while, so that prefills are spread over time.

        An engine may tell of a response's tokens at its end: they are spread evenly over the time that it took.
        """
        self._ended.clear()
        pool = await self._begin(size)
        await asyncio.sleep(WARM_UP_S)
        began = time.monotonic()
        await asyncio.sleep(self._args.seconds)
        until, self._last = time.monotonic(), True
        await asyncio.gather(*pool)
        self._last = False
        return sum(each.tokens_between(began, until) for each in self._ended) / (until - began)

    async def _counted(self, tokens: int) -> None:
        """Wait for so many more tokens."""
        self._enough.clear()
        self._awaited = self._tokens + tokens
        await self._enough.wait()

    async def _begin(self, size: int) -> list[asyncio.Task[None]]:
        self._numbers = itertools.count()
        # First responses of different lengths, so that requests do not go on ending and beginning together.
        firsts = [max(1, self._args.tokens * (i + 1) // size) for i in range(size)]
        return [asyncio.create_task(self._keep_busy(first)) for first in firsts]

    async def _end(self, pool: list[asyncio.Task[None]]) -> None:
        for task in pool:
            task.cancel()
        await asyncio.gather(*pool, return_exceptions=True)
        await self._engine.abort()

    async def _keep_busy(self, first: int) -> None:
        await self._answer(first)
        while not self._last:
            await self._answer(self._args.tokens)

    async def _answer(self, most: int) -> None:
        began, tokens = time.monotonic(), 0
        number = next(self._numbers)
        sampling = SamplingParams(max_new_tokens=most, temperature=self._args.temperature, seed=number)
        prompt = self._prompts[number % len(self._prompts)]
        request = GenerationRequest(f"{self._name}-{next(self._ids)}", prompt, sampling)
        async for delta in self._engine.generate(request):
            tokens += len(delta.token_ids)
            self._tokens += len(delta.token_ids)
            if self._tokens >= self._awaited:
                self._enough.set()
        self._ended.append(Ended(began, time.monotonic(), tokens))

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

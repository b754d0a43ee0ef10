"""The same groups answered by bare `sglang.Engine`, by our engine and through a rollout service, in turn.

Each peer is a process of its own, `python -m benchmarks.gpu.peers KIND WORKLOAD`, that starts SGLang with the same
settings and answers a line on stdin, the tokens of a response, with one on stdout: how long a round took. `bare` gives
`sglang.Engine` all samples in one call, each prompt once a sample. `service` leases groups to a rollout service, as the
controller does, and waits until all are scored and queued. `engine` asks the engine of the rollout service alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.workload import REPOSITORY, Workload, prompts
from miles.cores import THREADS_VARIABLE, WAIT_VARIABLE, usable_cores

START_DEADLINE_S = 400.0
ROUND_DEADLINE_S = 180.0


def say(message: dict[str, Any]) -> None:
    """A line for the process that compares the peers."""
    print("@" + json.dumps(message), flush=True)


def work_bare(load: Workload) -> None:
    """sglang.Engine in this process."""
    import sglang

    inputs = [prompt for prompt in prompts(load.groups) for _ in range(load.samples)]
    engine = sglang.Engine(
        model_path=load.model,
        device=load.device,
        dtype=load.dtype,
        max_running_requests=len(inputs),
        enable_return_routed_experts=load.routing,
        **load.server_flags,
    )
    say({"ready": True})
    for line in sys.stdin:
        began = time.perf_counter()
        outputs = engine.generate(
            input_ids=inputs,
            sampling_params={"temperature": 1.0, "max_new_tokens": int(line)},
            return_logprob=True,
            return_routed_experts=load.routing,
        )
        took = time.perf_counter() - began
        assert all(len(out["meta_info"]["output_token_logprobs"]) == len(out["output_ids"]) for out in outputs)
        say({"seconds": took, "tokens": sum(len(out["output_ids"]) for out in outputs)})
    engine.shutdown()


async def work_service(load: Workload) -> None:
    """A rollout service in a process of its own, and a client here."""
    from benchmarks.gpu.rollout_client import group_client

    folder = pathlib.Path(tempfile.mkdtemp(prefix="peers-"))
    async with group_client(load.job(folder), folder, load.samples_of.get("rollout")) as client:
        say({"ready": True})
        async for tokens in _rounds():
            done = await client.round(prompts(load.groups), tokens)
            stages = {
                "leased": done.leased_s,
                "generate, median": statistics.median(done.generate_s),
                "generate, longest": max(done.generate_s),
                "rewards after it, median": statistics.median(done.reward_s),
                "first group done": done.finished_s[0],
                "half of them done": statistics.median(done.finished_s),
            }
            say({"seconds": done.finished_s[-1], "tokens": done.tokens, "stages": stages})


async def work_engine(load: Workload) -> None:
    """The rollout service's engine in this process, asked for groups of samples as the service does."""
    from miles.config import JobConfig
    from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
    from miles.services.rollout.engines.checkpoint_weights import read_published
    from miles.services.rollout.engines.registry import configured_engine
    from miles.services.rollout.groups.partial_response import Piece

    folder = pathlib.Path(tempfile.mkdtemp(prefix="peers-"))
    config = JobConfig.from_flat(load.job(folder))
    engine = configured_engine(config, device=load.device, name="bench")

    async def respond(group: int, sample: int, prompt: list[int], tokens: int) -> int:
        sampling = SamplingParams(max_new_tokens=tokens)
        name = f"{group}" if load.samples > 1 else ""
        request = GenerationRequest(
            f"{group}-{sample}", prompt, sampling, return_routed_experts=load.routing, group=name
        )
        piece = Piece()
        async with contextlib.aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                piece.add(delta)
        return len(piece.token_ids)

    await engine.start()
    try:
        await engine.load_weights(0, read_published(config))
        say({"ready": True})
        async for tokens in _rounds():
            began = time.perf_counter()
            each = [
                (group, i, prompt) for group, prompt in enumerate(prompts(load.groups)) for i in range(load.samples)
            ]
            counts = await asyncio.gather(*(respond(*which, tokens) for which in each))
            say({"seconds": time.perf_counter() - began, "tokens": sum(counts)})
    finally:
        await engine.close()


async def _rounds() -> Any:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        yield int(line)


WORK: dict[str, Callable[[Workload], Any]] = {"bare": work_bare, "service": work_service, "engine": work_engine}
"""What a peer does, by its kind."""


class Peer:
    """A process that measures when it is told to."""

    def __init__(self, kind: str, name: str, load: Workload, logs: pathlib.Path) -> None:
        self.name = name
        interpreter = load.interpreter if kind == "bare" else sys.executable
        command = [interpreter, "-m", "benchmarks.gpu.peers", kind, json.dumps(dataclasses.asdict(load))]
        # As a service sets them for its server too (`miles.cores`): threads that wait leave the cores to others.
        threads = {THREADS_VARIABLE: str(usable_cores()), WAIT_VARIABLE: "PASSIVE"}
        environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"}
        if load.device == "cpu" and load.python:
            environment["MILES_TEST_SGLANG"] = load.python
        self._log = (logs / f"{name.replace(' ', '-')}.log").open("w")
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.pid = self._process.pid
        self._began = time.monotonic()
        self.started_s: float | None = None
        """Seconds of its start; None until it has said something."""
        self._messages: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                if line.startswith("@"):
                    self._messages.append(json.loads(line[1:]))
                    self.started_s = self.started_s or time.monotonic() - self._began
                else:
                    self._log.write(line)
                self._changed.notify_all()
        with self._changed:
            self._messages.append({"ended": True})
            self._changed.notify_all()

    def heard(self, deadline_s: float) -> bool:
        """Whether it says something, or has ended, by then; `next` returns it."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._messages), deadline_s)

    def next(self, deadline_s: float) -> dict[str, Any]:
        """What it says next. Raises RuntimeError when it has ended or says nothing in time."""
        message = {"ended": True}
        if self.heard(deadline_s):
            with self._changed:
                message = self._messages.pop(0)
        if "ended" in message:
            raise RuntimeError(f"{self.name} ended or was silent for {deadline_s:.0f} s; see {self._log.name}")
        return message

    def measure(self, tokens: int, deadline_s: float = ROUND_DEADLINE_S) -> dict[str, Any]:
        """One round of responses of so many tokens at most: seconds, tokens and stages."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        return self.next(deadline_s)

    def ask_to_end(self) -> None:
        """Tell it that no round follows."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def stop(self) -> None:
        """End it; one that still starts does not look for rounds, and is terminated."""
        self.ask_to_end()
        if self.started_s is None:
            self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def alternate(
    peers: Sequence[Peer], tokens: int, rounds: int, warm_ups: int, then: Callable[[], None] = lambda: None
) -> dict[str, list[dict[str, Any]]]:
    """Start all peers, warm each up, then let them work in turn; what each said in every round, by its name.

    `then` is called before they are stopped.
    """
    answers: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    try:
        for peer in peers:
            peer.next(START_DEADLINE_S)
        for _ in range(warm_ups):
            for peer in peers:
                peer.measure(tokens)
        for _ in range(rounds):
            for peer in peers:
                answer = peer.measure(tokens)
                answers[peer.name].append(answer)
                print(f"{peer.name}: {answer['tokens']} tokens in {answer['seconds']:.3f} s", flush=True)
        then()
    finally:
        stop_all(peers)
    return answers


def stop_all(peers: Sequence[Peer]) -> None:
    """End peers, all at the same time."""
    for peer in peers:
        peer.ask_to_end()
    for peer in peers:
        peer.stop()


if __name__ == "__main__":
    made = WORK[sys.argv[1]](Workload(**json.loads(sys.argv[2])))
    if asyncio.iscoroutine(made):
        asyncio.run(made)

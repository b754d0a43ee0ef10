"""Tokens per second through the rollout service against bare `sglang.Engine`, on the same requests and settings.

    python -m benchmarks.gpu.sglang_throughput
    python -m benchmarks.gpu.sglang_throughput --cases dense --requests 64 --tokens 64 --python .venv-sglang/bin/python

Random models (0.18 B dense, 0.4 B mixture of experts) answer requests that are all there at once: random prompts of 64
tokens, responses forced to a length, log-probabilities on. `bare` calls sglang.Engine in its own process; `service` is
a rollout service, a process of its own, that starts the same SGLang as a server and streams every response to a client
over gRPC. Every server is started before anything is measured; rounds then alternate between the two, one at work at a
time, after a warm-up. The best round of each counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.models import TINY_VOCABULARY, write_checkpoint
from benchmarks.gpu.rollout_client import PROMPT_TOKENS, START_DEADLINE_S, one_response, rollout_service

CASES = {"dense": ("dense", False), "moe": ("moe", False), "moe-routing": ("moe", True)}
"""Model, and whether routed experts are recorded."""
ROUND_DEADLINE_S = 180.0
WARM_UP_TOKENS = 32
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
GPU_FLAGS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.8,
    "cuda_graph_bs_decode": [1, 8, 32, 64, 128, 256, 384, 512],
    "disable_prefill_cuda_graph": True,
    "log_level": "warning",
}
CPU_FLAGS = {"attention_backend": "torch_native", "mem_fraction_static": 0.3, "log_level": "warning"}


def prompts(count: int) -> list[list[int]]:
    """Random prompts without a common prefix, of tokens that every model has."""
    rng = random.Random(0)
    return [[rng.randrange(300, TINY_VOCABULARY - 1) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def server_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What both sides give SGLang."""
    flags = dict(GPU_FLAGS if args.device == "cuda" else CPU_FLAGS)
    return {**flags, "max_total_tokens": args.requests * (PROMPT_TOKENS + args.tokens + 16), **json.loads(args.flags)}


def say(message: dict[str, Any]) -> None:
    """A line for the coordinator."""
    print("@" + json.dumps(message), flush=True)


def work_bare(args: argparse.Namespace, routing: bool) -> None:
    """sglang.Engine in this process."""
    import sglang

    engine = sglang.Engine(
        model_path=args.model,
        device=args.device,
        dtype="bfloat16",
        max_running_requests=args.requests,
        enable_return_routed_experts=routing,
        **server_flags(args),
    )
    say({"ready": True})
    for line in sys.stdin:
        tokens = int(line)
        sampling = {"temperature": 1.0, "max_new_tokens": tokens, "min_new_tokens": tokens}
        began = time.perf_counter()
        outputs = engine.generate(
            input_ids=prompts(args.requests),
            sampling_params=sampling,
            return_logprob=True,
            return_routed_experts=routing,
        )
        took = time.perf_counter() - began
        assert all(len(out["meta_info"]["output_token_logprobs"]) == len(out["output_ids"]) for out in outputs)
        say({"seconds": took, "tokens": sum(len(out["output_ids"]) for out in outputs)})
    engine.shutdown()


def work_service(args: argparse.Namespace, routing: bool) -> None:
    """A rollout service in a process of its own, and a client here."""
    asyncio.run(_work_service(args, routing))


async def _work_service(args: argparse.Namespace, routing: bool) -> None:
    from miles.queue import RedisServer
    from miles.rpc import connect
    from miles.rpc.gen import rollout_pb2, rollout_pb2_grpc

    folder = pathlib.Path(tempfile.mkdtemp(prefix="throughput-"))
    with RedisServer(folder / "redis") as redis:
        async with rollout_service(args.device) as address, connect(address) as channel:
            stub: Any = rollout_pb2_grpc.RolloutServiceStub(channel)
            config = json.dumps(service_config(args, routing, folder))
            start = rollout_pb2.RolloutStartJobRequest(job_id="bench", config_json=config, redis_url=redis.url)
            async for _ in stub.StartJob(start):
                pass
            say({"ready": True})
            loop = asyncio.get_running_loop()
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                began = time.perf_counter()
                counts = await asyncio.gather(
                    *(one_response(stub, prompt, int(line), routing) for prompt in prompts(args.requests))
                )
                say({"seconds": time.perf_counter() - began, "tokens": sum(counts)})
            await stub.StopJob(rollout_pb2.RolloutStopJobRequest(job_id="bench"))


def work_engine(args: argparse.Namespace, routing: bool) -> None:
    """The rollout service's engine in this process, asked for groups of samples as the service does."""
    asyncio.run(_work_engine(args, routing))


async def _work_engine(args: argparse.Namespace, routing: bool) -> None:
    from miles.config import JobConfig
    from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
    from miles.services.rollout.engines.checkpoint_weights import read_published
    from miles.services.rollout.engines.registry import configured_engine
    from miles.services.rollout.groups.partial_response import Piece

    folder = pathlib.Path(tempfile.mkdtemp(prefix="throughput-"))
    config = JobConfig.from_flat(service_config(args, routing, folder))
    engine = configured_engine(config, device=args.device, name="bench")
    await engine.start()
    try:
        await engine.load_weights(0, read_published(config))
        say({"ready": True})
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            sampling = SamplingParams(max_new_tokens=int(line), min_new_tokens=int(line))

            async def respond(i: int, prompt: list[int], sampling: SamplingParams = sampling) -> int:
                group = f"{i // args.group}" if args.group > 1 else ""
                request = GenerationRequest(f"{i}", prompt, sampling, return_routed_experts=routing, group=group)
                piece = Piece()
                async with contextlib.aclosing(engine.generate(request)) as deltas:
                    async for delta in deltas:
                        piece.add(delta)
                return len(piece.token_ids)

            began = time.perf_counter()
            counts = await asyncio.gather(*(respond(i, prompt) for i, prompt in enumerate(prompts(args.requests))))
            say({"seconds": time.perf_counter() - began, "tokens": sum(counts)})
    finally:
        await engine.close()


def service_config(args: argparse.Namespace, routing: bool, folder: pathlib.Path) -> dict[str, Any]:
    """A job whose engine is like the bare one."""
    return {
        "hf_checkpoint": args.model,
        "prompt_data": "none.jsonl",
        "label_key": "label",
        "num_rollout": 1,
        "rollout_batch_size": 8,
        "n_samples_per_prompt": 8,
        "rollout_max_response_len": args.tokens,
        "rm_type": "exact_match",
        "rollout_backend": "sglang",
        "rollout_dtype": "bfloat16",
        "device": args.device,
        "run_dir": str(folder),
        "max_running_requests": args.requests,
        "sglang_server_concurrency": args.requests,
        "use_rollout_routing_replay": routing,
        "lr": 1e-6,
        **({"rollout_engine_python": args.python} if args.python else {}),
        **{f"sglang_{name}": value for name, value in server_flags(args).items()},
    }


WORK = {"bare": work_bare, "service": work_service, "engine": work_engine}
"""What a worker measures, by its kind."""


class Worker:
    """A process that measures when it is told to."""

    def __init__(self, args: argparse.Namespace, kind: str, case: str, model: str, logs: pathlib.Path) -> None:
        self.name = f"{case} {kind}"
        interpreter = args.python if kind == "bare" and args.python else sys.executable
        command = [interpreter, "-m", "benchmarks.gpu.sglang_throughput", "--worker", kind, "--case", case]
        command += ["--model", model, "--device", args.device, "--flags", args.flags, "--python", args.python]
        command += ["--requests", str(args.requests), "--tokens", str(args.tokens), "--group", str(args.group)]
        self._log = (logs / f"{case}-{kind}.log").open("w")
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.pid = self._process.pid
        self._messages: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                if line.startswith("@"):
                    self._messages.append(json.loads(line[1:]))
                else:
                    self._log.write(line)
                self._changed.notify_all()
        with self._changed:
            self._messages.append({"ended": True})
            self._changed.notify_all()

    def next(self, deadline_s: float) -> dict[str, Any]:
        """What it says next; a message with `ended` when it has ended or says nothing in time."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._messages), deadline_s)
            return self._messages.pop(0) if self._messages else {"ended": True}

    def measure(self, tokens: int) -> dict[str, Any]:
        """One round of responses of so many tokens."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{tokens}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"ended": True}
        return self.next(ROUND_DEADLINE_S)

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def measure(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, list[float]]:
    """Tokens per second of each round, by case and kind."""
    logs = args.logs or folder
    logs.mkdir(parents=True, exist_ok=True)
    models = {
        kind: str(write_checkpoint(folder / kind, kind, weights=True)) for kind in {CASES[c][0] for c in args.cases}
    }
    workers = [Worker(args, kind, case, models[CASES[case][0]], logs) for case in args.cases for kind in args.kinds]
    rates: dict[str, list[float]] = {worker.name: [] for worker in workers}
    try:
        ready = []
        deadline = time.monotonic() + START_DEADLINE_S
        for worker in workers:
            if worker.next(max(0.0, deadline - time.monotonic())).get("ready"):
                ready.append(worker)
            else:
                print(f"{worker.name} did not start; see {logs}", flush=True)
        for worker in ready:
            worker.measure(WARM_UP_TOKENS)
        for _ in range(args.rounds):
            for worker in ready:
                answer = worker.measure(args.tokens)
                if "tokens" in answer:
                    rates[worker.name].append(answer["tokens"] / answer["seconds"])
                    print(f"{worker.name}: {answer['tokens']} tokens in {answer['seconds']:.2f} s", flush=True)
    finally:
        for worker in workers:
            worker.stop()
    return rates


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    add("--kinds", nargs="+", default=["bare", "service"], choices=["bare", "service"])
    add("--group", type=int, default=8, help="requests of a group, for the engine alone")
    add("--requests", type=int, default=512)
    add("--tokens", type=int, default=512)
    add("--rounds", type=int, default=2)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--python", default="", help="interpreter that has SGLang, when it is another one")
    add("--flags", default="{}", help="more SGLang flags, as a JSON object with underscores")
    add("--logs", type=pathlib.Path, help="folder for the processes' logs")
    add("--worker", choices=list(WORK), help=argparse.SUPPRESS)
    add("--case", choices=list(CASES), help=argparse.SUPPRESS)
    add("--model", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print the table."""
    args = parse()
    if args.worker:
        WORK[args.worker](args, CASES[args.case][1])
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory(prefix="throughput-models-") as folder:
        rates = measure(args, pathlib.Path(folder))
    print(f"\n{args.requests} requests x {args.tokens} tokens, log-probabilities on, {args.device}")
    print(f"{'case':<14}{'bare tok/s':>12}{'service tok/s':>15}{'service/bare':>14}")
    for case in args.cases:
        bare, service = (max(rates.get(f"{case} {kind}") or [0.0]) for kind in ("bare", "service"))
        share = f"{service / bare:>13.1%}" if bare else f"{'-':>13}"
        print(f"{case:<14}{bare:>12.0f}{service:>15.0f} {share}")


if __name__ == "__main__":
    main()

"""A whole run whose responses have 32k tokens, cut in the middle and resumed: what its processes hold grows as said.

To decode 32k tokens takes half an hour on two cores, so the run is stopped early and its half-finished responses in
Redis are made longer; the resumed run computes them again, generates the rest and trains on them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from trainer_cases import VOCAB, write_tokenizer
from whole_runs import Run, recipe, runs_of_test

from miles.memory.sequences import (
    Routing,
    SampleSize,
    attention_bytes,
    first_rank_bytes,
    logit_bytes,
    redis_bytes,
    replay_bytes,
    rollout_bytes,
    step_bytes,
)
from miles.queue import PartialStore, RedisServer, connect_async
from miles.rpc import ExitCode, connect_blocking
from miles.rpc.gen import controller_pb2, controller_pb2_grpc
from miles.types import Sample, VersionSpan
from miles.types.stored import read_groups

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

LAYERS, HIDDEN, HEADS, TOP_K, EXPERTS = 2, 32, 4, 8, 16
SHORT, LONG = 64, 32_768
LEFT = 32
"""Tokens that the resumed run generates."""
PROMPTS, SAMPLES = 1, 2
CHUNK = 2048
"""Tokens that the engine computes at a time."""
SLACK_BYTES = 64 << 20
"""What allocators keep of memory that was freed."""
ACTIVATION_BYTES = 24 * HIDDEN * 4
"""Of a row in a layer of this model, without the experts' part: norms, projections, residuals and their gradients."""
EXPERT_BYTES = 8 * TOP_K * HIDDEN * 4
"""Of a row in a layer: what its experts get and give."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A mixture of experts that never ends a response, and prompts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    made = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, moe_intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=8, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=True, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
        max_position_embeddings=LONG + 64,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(made / "model")
    write_tokenizer(made / "model")
    lines = [json.dumps({"prompt": f"w{i} w{i + 1} w{i + 2}", "label": "w3"}) for i in range(8)]
    (made / "train.jsonl").write_text("\n".join(lines) + "\n")
    return made


Start = Callable[[list[str], pathlib.Path], Run]


class Peaks:
    """Follows the peak of resident memory of a run's processes, by worker name."""

    def __init__(self, run: Run) -> None:
        self.found: dict[str, int] = {}
        self._run = run
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while self._run.process.poll() is None:
            try:
                for name, process in self._run.processes().items():
                    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
                    self.found[name] = max(self.found.get(name, 0), int(line.split()[1]) * 1024)
            except (psutil.Error, OSError, ValueError):
                pass  # a process ended
            time.sleep(0.5)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with runs_of_test(tmp_path_factory.mktemp("runs")) as starting:
        yield starting


def settings(folder: pathlib.Path, run_dir: pathlib.Path, length: int, redis_url: str) -> list[str]:
    """One step on one prompt, whose tokens all have a gradient, by the entropy."""
    changes: dict[str, Any] = {
        "num_rollout": 1, "rollout_batch_size": PROMPTS, "n_samples_per_prompt": SAMPLES, "entropy_coef": 0.01,
        "rollout_max_response_len": length, "rollout_max_context_len": length + 32, "max_running_requests": 2,
        "max_tokens_per_gpu": length + 16, "use_rollout_routing_replay": True, "log_whole_samples": True,
        "log_samples_per_step": PROMPTS, "gradient_checkpointing": True, "redis_url": redis_url,
    }  # fmt: skip
    return recipe(folder, run_dir, **changes)


def lengthen(sample: Sample, length: int) -> Sample:
    """A half-finished sample as it would be after so many tokens of its response."""
    random = np.random.default_rng(sample.index)
    more = length - sample.response_length
    assert sample.rollout_log_probs is not None
    assert sample.rollout_routed_experts is not None
    experts = random.permuted(np.tile(np.arange(EXPERTS, dtype=np.uint8), (more, LAYERS, 1)), axis=2)[..., :TOP_K]
    return dataclasses.replace(
        sample,
        tokens=np.concatenate([sample.tokens, random.integers(3, VOCAB, more, np.int32)]),
        response_length=length,
        rollout_log_probs=np.concatenate([sample.rollout_log_probs, np.full(more, -5, np.float32)]),
        rollout_routed_experts=np.concatenate([sample.rollout_routed_experts, experts]),
        weight_versions=(VersionSpan(0, 0, length),),
    )


async def lengthen_stored(url: str, length: int) -> int:
    """Lengthen the samples of every half-finished group; returns how many there were."""
    client = await connect_async(url)
    found = 0
    async for key in client.scan_iter("miles:*:partial:*"):
        _, job_id, _, group_id = key.decode().split(":")
        attempt = int(await client.hget(key, "attempt"))
        store = PartialStore(client, job_id)
        group = await store.load(int(group_id))
        assert group is not None
        group.samples[:] = [lengthen(sample, length) for sample in group.samples if sample.response_length]
        found += len(group.samples)
        assert await store.save(group.group_id, group, attempt=attempt)
    await client.aclose()
    return found


def cut(command: list[str], run_dir: pathlib.Path, start: Start, seconds: float) -> None:
    """Start a run and stop it so long after it began to generate."""
    run = start(command, run_dir)
    end = time.monotonic() + 400
    while not (run_dir / "controller.address").exists():
        assert run.process.poll() is None, run.output()
        assert time.monotonic() < end, run.output()
        time.sleep(0.1)
    with connect_blocking((run_dir / "controller.address").read_text()) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        while not any(
            stub.DescribeRun(controller_pb2.DescribeRunRequest(job_id=job.job_id)).running
            for job in stub.ListJobs(controller_pb2.ListJobsRequest()).jobs
        ):
            assert run.process.poll() is None, run.output()
            assert time.monotonic() < end, run.output()
            time.sleep(0.2)
    time.sleep(seconds)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(300) == ExitCode.INTERRUPTED, run.output()


def test_memory_grows_with_the_length_of_responses_as_is_said(
    folder: pathlib.Path, tmp_path: pathlib.Path, start: Start
) -> None:
    found: dict[int, tuple[Run, dict[str, int]]] = {}
    for length in (SHORT, LONG):
        with RedisServer(tmp_path / f"redis-{length}") as server:
            run_dir = tmp_path / f"run-{length}"
            command = settings(folder, run_dir, length, server.url)
            if length == LONG:
                attempts = (5.0, 20.0, 60.0)
                for seconds in attempts:  # until some tokens were generated before the stop
                    cut(command, run_dir, start, seconds)
                    if asyncio.run(lengthen_stored(server.url, length - LEFT)) == SAMPLES:
                        break
            run = start(command, run_dir)
            peaks = Peaks(run)
            assert run.wait(3000) == ExitCode.OK, run.output()
            found[length] = run, peaks.found | {"redis": asyncio.run(peak_of(server.url))}

    run, peaks_of_long = found[LONG]
    [file] = (run.run_dir / "samples").glob("*.groups.pb")
    samples = [sample for group in read_groups(file) for sample in group.samples]
    assert [sample.response_length for sample in samples] == [LONG] * SAMPLES
    for sample in samples:
        assert sample.rollout_routed_experts is not None
        assert sample.rollout_routed_experts.shape == (len(sample.tokens) - 1, LAYERS, TOP_K)
        assert (sample.rollout_log_probs == -5).sum() > LONG - 20_000  # what was stored was resumed
    [metrics] = run.metrics()
    assert metrics["rollout/response_tokens"] == SAMPLES * LONG
    assert metrics["train/grad_norm"] > 0

    size = SampleSize(3, LONG, Routing(LAYERS, TOP_K, EXPERTS), text_bytes_per_token=4)
    rows = size.tokens
    cache = 2 * LAYERS * SAMPLES * 2 * 2 * 8 * 4 * rows  # keys and values, twice while it grows
    bounds = {
        "rollout-0": cache
        + rollout_bytes(size, running_samples=2 * SAMPLES, groups_being_put=1, samples_per_group=SAMPLES)
        + 3 * HEADS * CHUNK * rows * 4,  # scores of a chunk of tokens that are computed again
        "redis": 3 * redis_bytes(size, samples_per_group=SAMPLES, queued_groups=1, running_groups=1),
        "trainer-0": first_rank_bytes(size, samples=SAMPLES, ranks=1)
        + step_bytes(size, samples=SAMPLES, replicas=1)
        + replay_bytes(rows, Routing(LAYERS, TOP_K, EXPERTS), keeps_activations=False)
        + logit_bytes(rows, VOCAB, bytes_per_number=4, chunk_elements=2**22)
        + attention_bytes(rows, heads=HEADS, kv_heads=2, head_size=8, bytes_per_number=4)
        + rows * (2 * LAYERS * HIDDEN * 4 + 2 * ACTIVATION_BYTES + 2 * EXPERT_BYTES),
    }
    before = found[SHORT][1]
    assert peaks_of_long.keys() == before.keys() >= bounds.keys()
    for name, peak in peaks_of_long.items():
        bound = bounds.get(name, SAMPLES * size.payload_bytes) + SLACK_BYTES
        print(f"{name}: {(peak - before[name]) / 1e6:.1f} MB more, {bound / 1e6:.1f} MB said")
        assert peak - before[name] <= bound, (name, peak, before[name], bound)


async def peak_of(url: str) -> int:
    """The most memory that a Redis server has had."""
    client = await connect_async(url)
    peak = int((await client.info("memory"))["used_memory_peak"])
    await client.aclose()
    return peak

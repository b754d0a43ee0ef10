"""Pause time of an SGLang engine in a weight update, by source of the weights, compared with device copies.

    python -m benchmarks.gpu.weight_update
    python -m benchmarks.gpu.weight_update --sources host --rounds 3

A 2 B model (4 GB in bfloat16) is served by one SGLang server; its weights come as tensors on the same GPU, handed over
as CUDA IPC handles, or as tensors in host memory, which go through staging buffers to the GPU first. The pause is what
`load_weights` returns: from the order to pause until the server decodes again; `whole` is all of the call, with what
comes before the pause. `copy` is what the device needs to copy as many bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.models import write_checkpoint
from benchmarks.gpu.workload import CPU_FLAGS, GPU_FLAGS, prompts
from miles.services.rollout.engines.base import GenerationRequest, PauseMode, SamplingParams
from miles.services.rollout.engines.sglang import SglangEngine, SglangOptions
from miles.services.rollout.engines.sglang.weights.layout import read_layout
from miles.weights.naming.contract import WeightContract

RUNNING = 64
"""Requests under way in the rounds with requests."""
Weights = Mapping[str, torch.Tensor]


def random_weights(folder: pathlib.Path, device: str, seed: int) -> dict[str, torch.Tensor]:
    """A full set of parameters, by name, in one allocation, as a transport leaves them."""
    shapes = read_layout(str(folder), WeightContract(form="checkpoint")).shapes
    sizes = {name: -(-math.prod(shape) // 64) * 64 for name, shape in shapes.items()}
    torch.manual_seed(seed)
    flat = torch.empty(sum(sizes.values()), device=device, dtype=torch.bfloat16).normal_(std=0.02)
    parts = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
    return {name: part[: math.prod(shapes[name])].view(shapes[name]) for name, part in parts.items()}


def copy_seconds(weights: Weights) -> float:
    """How long the device needs to copy as many bytes from one buffer to another."""
    source = torch.empty(sum(tensor.nbytes for tensor in weights.values()), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


async def under_way(engine: SglangEngine, count: int) -> list[asyncio.Task[int]]:
    """Start long responses and return when all of them decode."""

    async def respond(i: int, prompt: list[int]) -> int:
        sampling = SamplingParams(max_new_tokens=2000, min_new_tokens=2000)
        tokens = 0
        async for delta in engine.generate(GenerationRequest(f"r{i}-{time.monotonic()}", prompt, sampling)):
            tokens += len(delta.token_ids)
        return tokens

    before = engine.stats().generated_tokens
    tasks = [asyncio.create_task(respond(i, prompt)) for i, prompt in enumerate(prompts(count))]
    while engine.stats().generated_tokens < before + count:  # noqa: ASYNC110 (a benchmark may poll)
        await asyncio.sleep(0.05)
    return tasks


async def load(engine: SglangEngine, version: int, weights: Weights, mode: PauseMode) -> tuple[float, float]:
    """One update as the rollout service makes it; its pause, and all of it, in seconds."""
    began = time.perf_counter()
    if mode is PauseMode.IN_PLACE:
        pause_s = await engine.load_weights(version, weights)
        return pause_s, time.perf_counter() - began
    await engine.pause(mode)
    await engine.load_weights(version, weights)
    await engine.resume()
    whole_s = time.perf_counter() - began
    return whole_s, whole_s


async def measure(args: argparse.Namespace, folder: pathlib.Path) -> list[tuple[str, list[tuple[float, float]], int]]:
    """Rows of the table: what, seconds of each round (pause, whole), bytes."""
    on_gpu = args.device == "cuda"
    flags: dict[str, Any] = dict(GPU_FLAGS if on_gpu else CPU_FLAGS)
    flags |= {"load_format": "dummy", "max_total_tokens": RUNNING * 2200}
    if on_gpu:
        flags["cuda_graph_bs_decode"] = [1, RUNNING]
    options = SglangOptions(
        hf_checkpoint=str(folder),
        device=args.device,
        dtype="bfloat16",
        server_flags=flags,
        log_dir=args.logs or folder,
        **({"python": args.python} if args.python else {}),
    )
    engine = SglangEngine(options)
    rows: list[tuple[str, list[tuple[float, float]], int]] = []
    try:
        began = time.perf_counter()
        await engine.start()
        print(f"server started after {time.perf_counter() - began:.0f} s", flush=True)
        sets = [random_weights(folder, args.device, seed) for seed in (1, 2)]
        nbytes = sum(tensor.nbytes for tensor in sets[0].values())
        if on_gpu:
            rows.append(("copy on the device", [(copy_seconds(sets[0]),) * 2], nbytes))
        version = 0
        for where, source in (("GPU", sets), ("host", [{k: t.cpu() for k, t in each.items()} for each in sets])):
            if where not in args.sources or (where == "GPU" and not on_gpu):
                continue
            for mode, running in ((PauseMode.IN_PLACE, 0), (PauseMode.IN_PLACE, RUNNING), (PauseMode.RETRACT, RUNNING)):
                tasks = await under_way(engine, running) if running else []
                times = []
                for _ in range(args.rounds):
                    version += 1
                    times.append(await load(engine, version, source[version % 2], mode))
                rows.append((f"from {where}, {mode.value}, {running} requests", times, nbytes))
                print(rows[-1], flush=True)
                await engine.abort()
                await asyncio.gather(*tasks)
        began = time.perf_counter()
        await engine.weight_bytes()
        rows.append(("proof that the server holds them", [(time.perf_counter() - began,) * 2], nbytes))
    finally:
        await engine.close()
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large", choices=["large", "dense"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sources", nargs="+", default=["GPU", "host"], choices=["GPU", "host"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--python", default="", help="interpreter that has SGLang, when it is another one")
    parser.add_argument("--logs", type=pathlib.Path, help="folder for the server's log")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weight-update-") as folder:
        path = write_checkpoint(pathlib.Path(folder), args.model, weights=False)
        rows = asyncio.run(measure(args, path))
    print(f"\n{'weights':<40}{'GB':>7}{'median s':>10}{'worst s':>10}{'s/GB':>9}{'GB/s':>9}{'whole s':>9}")
    for what, times, nbytes in rows:
        pauses = [pause_s for pause_s, _ in times]
        median, whole = statistics.median(pauses), statistics.median(whole_s for _, whole_s in times)
        rate, gigabytes = nbytes / 1e9 / median, nbytes / 1e9
        print(
            f"{what:<40}{gigabytes:>7.2f}{median:>10.4f}{max(pauses):>10.4f}{median / gigabytes:>9.4f}"
            f"{rate:>9.1f}{whole:>9.4f}"
        )


if __name__ == "__main__":
    main()

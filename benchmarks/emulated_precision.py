"""What emulating low precision costs: decoding by the torch engine and training steps of fsdp, formats in turn.

Every round has each format generate groups and train on them, so that other work on the machine slows all alike. The
table has medians, and the mean difference of log-probabilities between trainer and engine.

    python -m benchmarks.emulated_precision --model tiny-moe
    python -m benchmarks.emulated_precision --model dense --dtype bfloat16 --device cuda --tokens 64 --rounds 5

`--model` is a Hugging Face folder or one of `benchmarks.gpu.models`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gpu.models import write_checkpoint
from miles.config import JobConfig
from miles.precision.of_run import rollout_recipe
from miles.precision.tensors import QuantisedTensors
from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.torch import TorchEngine
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan
from miles.weights.export_format import AS_TRAINED, formatted

FORMATS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp8_block": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
    "int4": {"int4_qat": True, "int4_group_size": 32, "int4_layers": ["."]},
    "mxfp8": {"fp8_format": "e4m3", "fp8_recipe": "mxfp8"},
    "nvfp4": {"fp4_format": "e2m1", "fp4_recipe": "nvfp4"},
}
GROUPS, SAMPLES, PROMPT = 4, 8, 32


@dataclasses.dataclass
class Pair:
    """A trainer and an engine of one format, and what was measured of them."""

    trainer: FsdpBackend
    engine: TorchEngine
    decode_s: list[float] = dataclasses.field(default_factory=list)
    step_s: list[float] = dataclasses.field(default_factory=list)
    differences: list[float] = dataclasses.field(default_factory=list)


async def start(model: pathlib.Path, settings: dict[str, Any], options: argparse.Namespace) -> Pair:
    """Load the trainer, and serve its weights."""
    config = JobConfig.from_flat(
        {
            "hf_checkpoint": str(model), "prompt_data": "none.jsonl", "label_key": "label", "rm_type": "exact_match",
            "rollout_batch_size": GROUPS, "n_samples_per_prompt": SAMPLES, "rollout_max_response_len": options.tokens,
            "num_rollout": 1000, "lr": 1e-6, "use_dynamic_batch_size": True, "max_tokens_per_gpu": 4096,
            "train_dtype": options.dtype, "rollout_dtype": options.dtype, "device": options.device,
            "log_samples_per_step": 0, "run_dir": str(model.parent / "run"), "actor_num_gpus_per_node": 1, **settings,
        }
    )  # fmt: skip
    trainer = FsdpBackend(config, model.parent / "checkpoints", torch.device(options.device))
    trainer.load()
    recipe = rollout_recipe(config)
    engine = TorchEngine(model, device=options.device, dtype=options.dtype, recipe=recipe)
    await engine.start()
    exported = ((name, t.detach().clone().to(getattr(torch, options.dtype))) for name, t in trainer.export())
    export_format = AS_TRAINED if recipe is None else QuantisedTensors(recipe)
    await engine.load_weights(0, dict(formatted(export_format, exported)))
    return Pair(trainer, engine)


async def generate(engine: TorchEngine, seed: int, tokens: int) -> list[SampleGroup]:
    """Groups of random prompts, all at once."""

    async def one(group: int, index: int) -> Sample:
        prompt = np.random.default_rng((seed, group)).integers(3, 200, PROMPT).tolist()
        params = SamplingParams(max_new_tokens=tokens, min_new_tokens=tokens, seed=1000 * seed + 10 * group + index)
        response, log_probs = [], []
        async for delta in engine.generate(GenerationRequest(f"{group}-{index}", prompt, params)):
            response += delta.token_ids
            log_probs += delta.log_probs
        return Sample(
            group_id=group, index=index, prompt="p", tokens=np.array(prompt + response, np.int32),
            response_length=len(response), response="r", reward=float(index % 2), status=SampleStatus.COMPLETED,
            rollout_log_probs=np.array(log_probs, np.float32), weight_versions=(VersionSpan(0, 0, len(response)),),
        )  # fmt: skip

    samples = await asyncio.gather(*(one(group, index) for group in range(GROUPS) for index in range(SAMPLES)))
    return [SampleGroup("job", group, samples[SAMPLES * group : SAMPLES * (group + 1)]) for group in range(GROUPS)]


async def measure(model: pathlib.Path, options: argparse.Namespace) -> dict[str, Pair]:
    """Run all rounds; the first is not counted."""
    pairs = {name: await start(model, settings, options) for name, settings in FORMATS.items()}
    for number in range(options.rounds + 1):
        for pair in pairs.values():
            begin = time.perf_counter()
            groups = await generate(pair.engine, number, options.tokens)
            middle = time.perf_counter()
            metrics = pair.trainer.train(number, groups, lambda progress: None)  # its metrics wait for the device
            if number:
                pair.decode_s.append(middle - begin)
                pair.step_s.append(time.perf_counter() - middle)
            else:
                pair.differences.append(metrics["train/train_rollout_logprob_abs_diff"])
    for pair in pairs.values():
        await pair.engine.close()
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-moe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=32, help="of a response")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device != "cpu" else "gloo", store=dist.HashStore(),
                            rank=0, world_size=1)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(options.model)
        if not model.is_dir():
            model = pathlib.Path(folder) / "model"
            write_checkpoint(model, options.model, weights=True)
        pairs = asyncio.run(measure(model, options))
    print("| format | tokens/s | time of decoding | step, s | time of a step | log-prob difference |")
    print("|---|---|---|---|---|---|")
    tokens, plain = GROUPS * SAMPLES * options.tokens, pairs["none"]
    for name, pair in pairs.items():
        decode, step = statistics.median(pair.decode_s), statistics.median(pair.step_s)
        ratios = [decode / statistics.median(plain.decode_s), step / statistics.median(plain.step_s)]
        times = f"{tokens / decode:.0f} | {ratios[0]:.2f} | {step:.3f} | {ratios[1]:.2f}"
        print(f"| {name} | {times} | {pair.differences[0]:.1e} |")


if __name__ == "__main__":
    main()

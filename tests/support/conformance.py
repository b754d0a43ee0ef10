"""What a conformance test combines, and a trainer whose versions go to an engine that was started by others."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sglang_kit import Response, respond
from trainer_cases import job_config, random_groups
from trainer_process import TrainerProcess

from miles.config import JobConfig
from miles.queue import GroupQueue, connect_async
from miles.services.rollout.engines.base import RolloutEngine
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan

TRANSPORTS = ("shared_memory", "broadcast", "disk_delta")
GROUPS = 4
RESPONSE_TOKENS = 16
PROMPTS = [[3 + (7 * group + 11 * place) % 90 for place in range(5 + 3 * group)] for group in range(GROUPS)]
_MEGATRON: dict[str, Any] = {"train_backend": "megatron", "actor_num_gpus_per_node": 2}
_TENSOR: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_LAYOUTS = dict.fromkeys(("Qwen3", "Llama", "Qwen2, Qwen2.5", "Gemma 2", "Gemma 3"), _TENSOR)
_LAYOUTS |= {family: {**_TENSOR, "expert_model_parallel_size": 2} for family in ("Qwen3-MoE", "MiniMax-M2")}
"""Of the families that are not spread by experts alone; two ranks each."""


@dataclasses.dataclass(frozen=True)
class Combination:
    """A row of the matrix."""

    backend: str
    engine: str
    family: str
    transport: str

    def __str__(self) -> str:
        return "-".join((self.backend, self.engine, self.family.replace(", ", "+"), self.transport))

    def config(self, model: pathlib.Path, run_dir: pathlib.Path, disk: pathlib.Path) -> JobConfig:
        """Two samples a prompt, one optimizer step a rollout, float32 everywhere."""
        changes: dict[str, Any] = {}
        if self.transport == "disk_delta":
            changes["update_weight_disk_dir"] = str(disk)
        if self.backend == "megatron":
            changes |= {**_MEGATRON, **_LAYOUTS.get(self.family, {"expert_model_parallel_size": 2})}
            if self.family.endswith("MTP"):
                changes |= {"mtp_num_layers": 1, "enable_mtp_training": True}
        return job_config(
            model,
            rollout_backend=self.engine,
            update_weight_transfer_mode=self.transport,
            update_weight_buffer_size=1 << 16,
            rollout_batch_size=GROUPS,
            n_samples_per_prompt=2,
            rollout_max_response_len=RESPONSE_TOKENS,
            weight_decay=0.1,
            log_samples_per_step=GROUPS,
            run_dir=str(run_dir),
            **changes,
        )


class TrainedJob:
    """A job of a trainer that runs already; its groups come from here, and its engine is the caller's."""

    def __init__(self, trainer: TrainerProcess, job_id: str, config: JobConfig, redis_url: str) -> None:
        self._trainer = trainer
        self._job_id = job_id
        self._config = config
        self._redis_url = redis_url
        self._run_dir = pathlib.Path(config.services.run_dir)

    @contextlib.asynccontextmanager
    async def held(self, weightsync_address: str) -> AsyncIterator[None]:
        """Have the trainer hold the job, with the initial weights."""
        arguments = (self._job_id, self._config, self._redis_url, weightsync_address, self._run_dir)
        await asyncio.to_thread(self._trainer.start_job, *arguments)
        try:
            yield
        finally:
            await asyncio.to_thread(self._trainer.stop_job, self._job_id)

    async def train(self, step: int, groups: Sequence[SampleGroup]) -> None:
        """Take a step on these groups."""
        async with await connect_async(self._redis_url) as client:
            queue = GroupQueue(client, self._job_id, consumer="test")
            for group in groups:
                await queue.put(group, attempt=0)
        await asyncio.to_thread(self._trainer.train, self._job_id, step, [group.group_id for group in groups])

    async def export(self, version: int) -> None:
        """Publish the weights as they are."""
        await asyncio.to_thread(self._trainer.export, self._job_id, version)

    async def save_hf(self) -> pathlib.Path:
        """Write the weights as they are; the folder."""
        saved = await asyncio.to_thread(self._trainer.save, self._job_id, True)
        return pathlib.Path(saved.hf_dir)

    def largest_difference(self, step: int) -> float:
        """Between the trainer's own log-probs of a step's responses and those that came with them, in nats."""
        lines = [
            json.loads(line)
            for path in sorted((self._run_dir / "samples").glob(f"step_{step:08d}.rank?.jsonl"))
            for line in path.read_text().splitlines()
        ]
        found = [sample["log_prob_diff_max"] for line in lines for sample in line["samples"]]
        assert len(found) == 2 * GROUPS, f"{len(found)} samples of step {step} were logged"
        return float(max(found))


def first_groups(job_id: str) -> list[SampleGroup]:
    """Something to train on."""
    groups = random_groups(1, range(GROUPS), samples=2)
    for group in groups:
        group.job_id = job_id
    return groups


async def answers(engine: RolloutEngine, temperature: float) -> list[Response]:
    """A response to each prompt."""
    asked = (
        respond(engine, prompt, temperature=temperature, max_new_tokens=RESPONSE_TOKENS, seed=number)
        for number, prompt in enumerate(PROMPTS)
    )
    return list(await asyncio.gather(*asked))


def answered_groups(job_id: str, *answers: Sequence[Response]) -> list[SampleGroup]:
    """The groups that follow `first_groups`, each of one answer of every list to the group's prompt."""
    groups = []
    for number, (prompt, *responses) in enumerate(zip(PROMPTS, *answers, strict=True)):
        samples = [_sample(GROUPS + number, index, prompt, response) for index, response in enumerate(responses)]
        groups.append(SampleGroup(job_id, GROUPS + number, samples))
    return groups


def _sample(group_id: int, index: int, prompt: Sequence[int], response: Response) -> Sample:
    return Sample(
        group_id=group_id,
        index=index,
        prompt="p",
        tokens=np.array([*prompt, *response.tokens], np.int32),
        response_length=len(response.tokens),
        response="r",
        reward=float(index),
        status=SampleStatus.COMPLETED,
        rollout_log_probs=np.array(response.log_probs, np.float32),
        weight_versions=tuple(
            VersionSpan(span.version, span.start, span.end) for span in response.result.weight_versions
        ),
    )


def stored(folder: pathlib.Path) -> Mapping[str, torch.Tensor]:
    """All tensors of a Hugging Face folder by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def greedy_tokens(folder: pathlib.Path, responses: Sequence[Response]) -> list[list[int]]:
    """What transformers' model of a folder, in float32, finds likeliest at each place of the responses."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    likeliest = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *response.tokens]])).logits[0, len(prompt) - 1 : -1]
        likeliest.append(logits_TV.argmax(-1).tolist())
    return likeliest

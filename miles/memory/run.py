"""What the estimates depend on: the models, and the settings of a run."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.config.schema.flat_settings import FlatSettings
from miles.memory.headers import count_in_headers
from miles.memory.model import ModelShape, shape_of
from miles.memory.parameters import Parameters, model_parameters
from miles.precision.number_types import AUTO, decide

_PROMPT_TOKENS = 1024
"""Length of a prompt of which no setting says anything."""


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """One model of a run."""

    parameters: Parameters
    shape: ModelShape | None
    """None when config.json lacks sizes: then activations and KV caches are not estimated."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Everything that the formulas read; tokens are counts, `*_bytes` are bytes of an element."""

    settings: FlatSettings
    policy: Model
    teacher: Model | None
    """The model of on-policy distillation."""
    train_bytes: int
    """Of a weight that the trainer computes with."""
    master_bytes: int
    """Of a weight that fsdp's optimizer updates."""
    engine_bytes: int
    """Of a weight in engines and exports."""

    @property
    def ranks(self) -> int:
        """The trainer's processes."""
        return int(self.settings.actor_num_nodes * (self.settings.actor_num_gpus_per_node or 1))

    @property
    def parks(self) -> bool:
        """Whether the trainer moves to host memory while the engines work."""
        s = self.settings
        if s.offload_train is None:
            return bool(s.colocate and s.device == "cuda" and not s.fsdp_cpu_offload)
        return bool(s.offload_train and s.device == "cuda")

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained beside the policy."""
        return bool(self.settings.advantage_estimator == "ppo")

    @property
    def has_reference(self) -> bool:
        """Whether a reference's weights are held; a LoRA policy's reference is its own base."""
        s = self.settings
        return bool((s.use_kl_loss or s.kl_coef) and not s.lora_rank)

    @property
    def old_policies(self) -> int:
        """Copies of earlier policies, in host memory."""
        return int(self.settings.max_weight_staleness) if self.settings.keep_old_actor else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        s = self.settings
        if s.rollout_max_context_len is not None:
            return int(s.rollout_max_context_len)
        return int(s.rollout_max_response_len + (s.rollout_max_prompt_len or _PROMPT_TOKENS))

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        s = self.settings
        longest = -(-self.longest // s.context_parallel_size)
        return int(max(s.max_tokens_per_gpu, longest) if s.use_dynamic_batch_size else s.micro_batch_size * longest)

    @property
    def micro_batch_words(self) -> str:
        """Where the tokens of a micro-batch come from."""
        s = self.settings
        if s.use_dynamic_batch_size and s.max_tokens_per_gpu * s.context_parallel_size >= self.longest:
            return f"max_tokens_per_gpu = {s.max_tokens_per_gpu}"
        parts = "" if s.context_parallel_size == 1 else f" / {s.context_parallel_size} context-parallel ranks"
        count = "the longest sample" if s.use_dynamic_batch_size else f"{s.micro_batch_size} × the longest sample"
        return f"{count} of {self.longest} tokens{parts}"


def run_of(settings: FlatSettings | None) -> Run | None:
    """Return what the estimates of a configuration need; None without one, or without a readable model."""
    if settings is None or not settings.hf_checkpoint:
        return None
    s = settings
    policy = read_model(s.hf_checkpoint)
    if policy is None:
        return None
    types = decide(s.train_dtype, s.rollout_dtype, {})
    # Of two undecided types float32 is usual on a CPU, and larger.
    undecided = s.train_dtype == s.rollout_dtype == AUTO and s.device == "cpu"
    train = 4 if undecided or types.train_dtype == "float32" else 2
    return Run(
        settings=s,
        policy=policy,
        teacher=None if s.opd_teacher_load is None else read_model(s.opd_teacher_load) or policy,
        train_bytes=train,
        master_bytes=4 if s.keep_fp32_master else train,
        engine_bytes=4 if undecided or types.rollout_dtype == "float32" else 2,
    )


def read_model(folder: str) -> Model | None:
    """Return a folder's model by its config.json, or else by its weights' headers; None if neither can be read."""
    config: dict[str, Any] = read_json_object(pathlib.Path(folder) / "config.json")
    if (shape := shape_of(config)) is not None:
        return Model(model_parameters(shape), shape)
    count = count_in_headers(pathlib.Path(folder))
    return Model(Parameters(dense=count), None) if count else None

"""What the estimates depend on: the models, and the settings of a run."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sections.distillation import named
from miles.memory.headers import count_in_headers
from miles.memory.held import Held, held, unquantised
from miles.memory.model import ModelShape, shape_of
from miles.memory.parameters import Parameters, model_parameters
from miles.memory.tensors import model_tensors
from miles.precision.number_types import AUTO, decide
from miles.precision.of_run import recipes_of
from miles.precision.recipe import Recipe

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
    teachers: tuple[Model, ...]
    """Those of on-policy distillation that the trainer holds."""
    train_bytes: int
    """Of a weight that the trainer computes with."""
    master_bytes: int
    """Of a weight that fsdp's optimizer updates."""
    engine_bytes: int
    """Of a weight in engines and exports that is not quantised."""
    training: Recipe | None = None
    """By what the trainer computes."""
    serving: Recipe | None = None
    """By what weights are published and served."""

    @property
    def published(self) -> Held:
        """The policy's weights as they are published and exported."""
        return held_by(self.policy, self.serving, self.engine_bytes)

    @property
    def ranks(self) -> int:
        """The trainer's processes."""
        return int(self.settings.actor_num_nodes * (self.settings.actor_num_gpus_per_node or 1))

    @property
    def alone(self) -> bool:
        """Whether fsdp has one rank with plain parameters, which are cast and rounded once a step."""
        return self.ranks == 1 and not self.settings.fsdp_cpu_offload

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
    """Return what the estimates of a configuration need; None without one, or a readable model, or recipes."""
    if settings is None or not settings.hf_checkpoint:
        return None
    s = settings
    policy, config = read_model(s.hf_checkpoint), read_config(s.hf_checkpoint)
    recipes = recipes_of(s, config)
    if policy is None or recipes is None:
        return None
    types = decide(s.train_dtype, s.rollout_dtype, {})
    # Of two undecided types float32 is usual on a CPU, and larger.
    undecided = s.train_dtype == s.rollout_dtype == AUTO and s.device == "cpu"
    train = 4 if undecided or types.train_dtype == "float32" else 2
    return Run(
        settings=s,
        policy=policy,
        teachers=tuple(read_model(folder) or policy for folder in named(s.opd_teacher_load or ()).values()),
        train_bytes=train,
        master_bytes=4 if s.keep_fp32_master else train,
        engine_bytes=4 if undecided or types.rollout_dtype == "float32" else 2,
        training=recipes.trained,
        serving=recipes.served,
    )


def held_by(model: Model, recipe: Recipe | None, each: int) -> Held:
    """Return a model's weights by a recipe; of one whose shape is not known, as if they were not quantised."""
    if model.shape is None:
        return unquantised(model.parameters.total, each)
    return _held(model.shape, recipe, each)


@functools.lru_cache(maxsize=64)
def _held(shape: ModelShape, recipe: Recipe | None, each: int) -> Held:
    return held(model_tensors(shape), recipe, each)


def read_model(folder: str) -> Model | None:
    """Return a folder's model by its config.json, or else by its weights' headers; None if neither can be read."""
    if (shape := shape_of(read_config(folder))) is not None:
        return Model(model_parameters(shape), shape)
    count = count_in_headers(pathlib.Path(folder))
    return Model(Parameters(dense=count), None) if count else None


def read_config(folder: str) -> dict[str, Any]:
    """Return a folder's config.json; empty when it cannot be read."""
    found: dict[str, Any] = read_json_object(pathlib.Path(folder) / "config.json")
    return found

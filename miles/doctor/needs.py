"""Estimates the memory and disk that a job needs from its model and settings, and says by which formula."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.doctor.finding import size
from miles.doctor.subject import Subject
from miles.precision.number_types import AUTO, decide

_TOKEN_BYTES = 40
"""Of a recorded token: its text, id, mask, advantage and two log-probabilities, as JSON."""
_HEADER_LIMIT = 100 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """An amount of memory or disk, with the formula that gives it."""

    bytes: int
    formula: str

    def __str__(self) -> str:
        return f"about {size(self.bytes)} ({self.formula})"


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What the estimates depend on."""

    parameters: int
    weight_bytes: int
    """Bytes of a weight in engines."""
    master_bytes: int
    """Bytes of a weight, and of each of Adam's moments, in the trainer."""
    trained_models: int
    """The policy, and the critic if there is one."""
    frozen_models: int
    """Reference and teacher."""
    adapters_alone: bool
    """Whether the policy itself is frozen (LoRA)."""
    engines: int
    trainer_ranks: int
    saves: int
    """Checkpoints that the run writes; none is removed."""
    exports: int
    """Hugging Face exports that the run leaves."""
    with_optimizer: bool
    sample_tokens: int
    """Tokens of all samples that are recorded."""


def job_of(subject: Subject) -> Job | None:
    """Return what the configuration asks for; None without a configuration, or without a readable model."""
    if subject.settings is None or not subject.get("hf_checkpoint"):
        return None
    parameters = count_parameters(pathlib.Path(subject.get("hf_checkpoint")))
    if not parameters:
        return None
    s = subject.settings
    steps = s.num_rollout or 0
    saves = (math.ceil(steps / s.save_interval) if s.save_interval else 1) if steps else 0
    exports = saves if "{" in (s.save_hf or "") else min(saves, 1)  # without save_hf, one at the end
    types = decide(s.train_dtype, s.rollout_dtype, {})
    undecided = s.train_dtype == s.rollout_dtype == AUTO and s.device == "cpu"  # where float32 is usual, and larger
    weight_bytes = 4 if undecided or types.rollout_dtype == "float32" else 2
    return Job(
        parameters=parameters,
        weight_bytes=weight_bytes,
        master_bytes=4 if s.keep_fp32_master or types.train_dtype == "float32" else 2,
        trained_models=2 if s.advantage_estimator == "ppo" else 1,
        frozen_models=(s.ref_load is not None and not s.lora_rank) + (s.opd_teacher_load is not None),
        adapters_alone=bool(s.lora_rank),
        engines=s.rollout_num_workers if s.rollout_external_engine_addrs is None else 0,
        trainer_ranks=s.actor_num_nodes * (s.actor_num_gpus_per_node or 1),
        saves=saves,
        exports=exports,
        with_optimizer=not s.no_save_optim,
        sample_tokens=steps * s.log_samples_per_step * s.n_samples_per_prompt * (s.rollout_max_response_len or 0),
    )


def trainer_memory(job: Job) -> Need:
    """Return the memory of the trainer's ranks together, without activations."""
    master = job.master_bytes
    if job.adapters_alone:
        return Need(job.parameters * job.weight_bytes, f"{_count(job.parameters)} frozen weights × {job.weight_bytes}")
    trained = master + 4 + 2 * master
    formula = f"{_count(job.parameters)} parameters × ({master} weights + 4 gradients + {2 * master} Adam)"
    total = job.parameters * trained * job.trained_models
    if job.trained_models > 1:
        formula += f" × {job.trained_models} models"
    if job.frozen_models:
        total += job.parameters * job.weight_bytes * job.frozen_models
        formula += f" + × {job.weight_bytes} for {job.frozen_models} frozen"
    return Need(total, formula)


def engine_memory(job: Job) -> Need:
    """Return the memory of all engines' weights together, without KV caches."""
    formula = f"{job.engines} engines × {_count(job.parameters)} parameters × {job.weight_bytes}"
    return Need(job.engines * job.parameters * job.weight_bytes, formula)


def shared_memory(job: Job) -> Need:
    """Return what versions of the weights take in shared memory: the one that is served and the next one."""
    return Need(2 * job.parameters * job.weight_bytes, f"2 versions × {_count(job.parameters)} × {job.weight_bytes}")


def compared_versions(job: Job) -> Need:
    """Return the host memory in which the trainer keeps what it compares the next version with.

    That is for transports that send changes. Rank 0 has the last version; where there are more ranks, each keeps its
    shards besides.
    """
    copies = 1 if job.trainer_ranks == 1 else 2
    what = "last version" if copies == 1 else "last version, on rank 0 and in shards,"
    return Need(
        copies * job.parameters * job.weight_bytes, f"{what} {copies} × {_count(job.parameters)} × {job.weight_bytes}"
    )


def disk(job: Job) -> Need:
    """Return what the run writes: checkpoints, exports and samples."""
    state = job.master_bytes * (3 if job.with_optimizer else 1)
    checkpoint = 0 if job.adapters_alone else job.parameters * state * job.trained_models
    samples = job.sample_tokens * _TOKEN_BYTES
    total = job.saves * checkpoint + job.exports * job.parameters * job.weight_bytes + samples
    formula = f"{job.saves} checkpoints × {size(checkpoint)} + {job.exports} exports × "
    return Need(total, f"{formula}{size(job.parameters * job.weight_bytes)} + {size(samples)} of samples")


def count_parameters(folder: pathlib.Path) -> int:
    """Return the parameters of a Hugging Face model: by its weights' headers, else by its config; 0 if unreadable."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(map(_tensors_in, files)) or _by_config(read_json_object(folder / "config.json"))


def _tensors_in(file: pathlib.Path) -> int:
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length < _HEADER_LIMIT:
            return 0
        try:
            header = json.loads(opened.read(length))
        except ValueError:
            return 0  # the check of the configuration says that the file is damaged
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _by_config(config: Mapping[str, Any]) -> int:
    model = {**config, **config.get("text_config", {})}
    try:
        hidden, layers, vocabulary = (int(model[key]) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
        heads = int(model["num_attention_heads"])
        groups = int(model.get("num_key_value_heads") or heads)
        head = int(model.get("head_dim") or hidden // heads)
        counts = ("num_experts", "n_routed_experts", "num_local_experts")
        experts = next((int(model[key]) for key in counts if key in model), 0)
        narrow = "moe_intermediate_size" if experts and "moe_intermediate_size" in model else "intermediate_size"
        width = int(model[narrow])
    except KeyError:
        return 0
    embeddings = vocabulary * hidden * (1 if model.get("tie_word_embeddings") else 2)
    return embeddings + layers * (2 * hidden * head * (heads + groups) + 3 * hidden * width * max(1, experts))


def _count(parameters: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= limit:
            return f"{parameters / limit:.3g}{unit}"
    return str(parameters)

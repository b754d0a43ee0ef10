"""The configured roles, as this rank's parts of Megatron-Core models and copies of their weights."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from miles.config.checks.model_layout import shape_differences
from miles.megatron_checkpoint import tensors_of
from miles.services.trainer.backends.megatron.learner import MegatronCritic, MegatronPolicy
from miles.services.trainer.backends.megatron.lora.base_role import AdaptedBase
from miles.services.trainer.backends.megatron.model.build_model import (
    MegatronModel,
    build_model,
    read_weights,
    wants_replay,
)
from miles.services.trainer.backends.megatron.model.expert_bias import ExpertBias
from miles.services.trainer.backends.megatron.mtp.training import MtpTraining
from miles.services.trainer.backends.megatron.optimizer import MegatronOptimizer
from miles.services.trainer.backends.megatron.parallel.forward_output import LogProbOptions, LogProbOutput, ValueOutput
from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank
from miles.services.trainer.backends.megatron.replay.engine_rows import RowCutter
from miles.services.trainer.backends.megatron.replay.observer import RoutingObserver
from miles.services.trainer.backends.megatron.replay.router import ModelReplay, moe_layer_numbers
from miles.services.trainer.backends.megatron.replay.step_routing import Routing
from miles.services.trainer.checkpoint.initial_weights import initial_weights
from miles.services.trainer.step import algorithm_options
from miles.services.trainer.step.old_policies import OldPolicies
from miles.services.trainer.step.roles import Roles
from miles.services.trainer.step.teachers import Teachers
from miles.services.trainer.step.weight_copy import CopiedRole, WeightCopy

if TYPE_CHECKING:
    from miles.config import JobConfig


@dataclasses.dataclass(frozen=True)
class MegatronRoles(Roles):
    """See `Roles`."""

    policy: MegatronPolicy
    critic: MegatronCritic | None = None
    reference: CopiedRole | AdaptedBase | None = None
    teacher: CopiedRole | Teachers | None = None
    old_policies: OldPolicies | None = None
    routing: Routing | None = None
    """Of the policy; None where it is neither replayed nor observed."""


def build_roles(config: JobConfig, parallel: ParallelRank, device: torch.device) -> MegatronRoles:
    """Build this rank's parts and load their weights; collective.

    Raises FileNotFoundError when there is no checkpoint and ValueError for a model that the bridge does not know.
    """
    compute = algorithm_options.DTYPES[config.train.train_dtype]
    algorithm = config.algorithm
    model = build_model(config, parallel, compute)
    wants_reference, adapted = algorithm_options.needs_reference(config), config.lora.lora_rank > 0
    reference = _reference(model, config) if wants_reference and not adapted else None
    folders = config.distillation.teacher_folders
    teachers = {name: _weights_of(model, config, folder) for name, folder in folders.items()}
    routing = _routing(config, model, parallel, device)
    options = LogProbOptions(
        temperature=config.rollout.rollout_temperature,
        chunk_rows=config.train.log_probs_chunk_size if config.train.log_probs_chunk_size > 0 else None,
        with_entropy=algorithm.entropy_coef != 0 or algorithm.observe_training_entropy,
        entropy_requires_grad=algorithm.entropy_coef != 0,
    )
    policy = MegatronPolicy(
        model,
        LogProbOutput(model.vocabulary, parallel, options),
        MegatronOptimizer(config.optimizer, config.megatron, model, compute),
        parallel,
        device,
        algorithm_options.policy_iterations(config),
        ExpertBias(model.bare_chunks, config.moe.moe_router_bias_update_rate),
        routing,
        _mtp_training(config, model, parallel, device, options.chunk_rows),
        padded=config.train.qkv_format == "bshd",
    )
    old_policies = None
    if algorithm.keep_old_actor:
        old_policies = OldPolicies(model.parameters, policy.compute_log_probs, config.rollout.max_weight_staleness)
    base = AdaptedBase(policy) if wants_reference and adapted else None
    return MegatronRoles(
        policy=policy,
        critic=_critic(config, parallel, compute, device) if algorithm_options.needs_critic(config) else None,
        reference=base if reference is None else CopiedRole(reference, policy.compute_log_probs_unrouted),
        teacher=_teacher(config, policy, teachers),
        old_policies=old_policies,
        routing=routing,
    )


def _teacher(
    config: JobConfig, policy: MegatronPolicy, weights: Mapping[str, WeightCopy]
) -> CopiedRole | Teachers | None:
    ask = (policy.compute_log_probs_unrouted, policy.score_token_sets_unrouted)
    roles = {name: CopiedRole(copy, *ask) for name, copy in weights.items()}
    return Teachers(roles, config.distillation) if len(roles) > 1 else next(iter(roles.values()), None)


def _critic(config: JobConfig, parallel: ParallelRank, compute: torch.dtype, device: torch.device) -> MegatronCritic:
    folder = config.checkpoint.critic_load or str(config.rollout.hf_checkpoint)
    model = build_model(config, parallel, compute, critic_from=folder)
    optimizer = MegatronOptimizer(algorithm_options.critic_optimizer(config), config.megatron, model, compute)
    return MegatronCritic(
        model,
        ValueOutput(parallel),
        optimizer,
        parallel,
        device,
        algorithm_options.critic_iterations(config),
        ExpertBias(model.bare_chunks, config.moe.moe_router_bias_update_rate),
        padded=config.train.qkv_format == "bshd",
    )


def _reference(model: MegatronModel, config: JobConfig) -> WeightCopy:
    checkpoint = config.checkpoint
    folder = checkpoint.ref_load or str(config.rollout.hf_checkpoint)
    return _weights_of(model, config, str(tensors_of(pathlib.Path(folder), checkpoint.ref_ckpt_step) or folder))


def _weights_of(model: MegatronModel, config: JobConfig, folder: str) -> WeightCopy:
    """The weights of a folder, which may be the model's own.

    Raises ValueError for a folder with a model of another shape.
    """
    if folder == initial_weights(config):
        return WeightCopy(model.parameters)
    has_mtp = config.megatron.mtp_num_layers is not None
    differences = shape_differences(str(config.rollout.hf_checkpoint), folder, with_mtp=has_mtp)
    if differences:
        raise ValueError(
            f"the weights of {folder} do not fit the policy's model: {'; '.join(differences)}; give a model of "
            "the policy's shape, or train with fsdp"
        )
    policy = WeightCopy(model.parameters)
    read_weights(model.bridge, pathlib.Path(folder), model.chunks)
    other = WeightCopy(model.parameters)
    policy.put()
    return other


def _mtp_training(
    config: JobConfig, model: MegatronModel, parallel: ParallelRank, device: torch.device, chunk_rows: int | None
) -> MtpTraining | None:
    layout = config.megatron
    if not layout.enable_mtp_training:
        return None
    weight = layout.mtp_loss_scaling_factor
    return MtpTraining(model.chunks, model.vocabulary, parallel, device, weight=weight, chunk_rows=chunk_rows)


def _routing(config: JobConfig, model: MegatronModel, parallel: ParallelRank, device: torch.device) -> Routing | None:
    if not (wants_replay(config) or config.rollout.records_routing):
        return None
    layers = moe_layer_numbers(model.config)
    replay = ModelReplay(model.bare_chunks, layers) if wants_replay(config) else None
    observer = RoutingObserver(model.bare_chunks, layers, parallel) if config.rollout.records_routing else None
    part, parts = (parallel.tensor_rank, parallel.tensor_size) if model.config.sequence_parallel else (0, 1)
    return Routing(config, replay, observer, RowCutter(part, parts, len(layers), device))

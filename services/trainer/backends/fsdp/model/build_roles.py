"""The configured roles, as models on their devices."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.precision.of_run import training_recipe
from miles.services.trainer.backends.fsdp.learner import AdaptedBase, FrozenModel, FsdpCritic, FsdpPolicy, local_weights
from miles.services.trainer.backends.fsdp.lora.adapter import Adapter, adapt
from miles.services.trainer.backends.fsdp.model.compiled_layers import compile_layers
from miles.services.trainer.backends.fsdp.model.forward import ForwardOptions, LogProbForward, ValueForward
from miles.services.trainer.backends.fsdp.model.fused_norms import fuse_norms
from miles.services.trainer.backends.fsdp.model.scoring_head import put_scoring_head
from miles.services.trainer.backends.fsdp.model.sharded_model import Precision, load_hf_model, place, put_value_head
from miles.services.trainer.backends.fsdp.model.working_weights import WorkingWeights
from miles.services.trainer.backends.fsdp.replay.step_routing import Routing
from miles.services.trainer.step import algorithm_options
from miles.services.trainer.step.old_policies import OldPolicies
from miles.services.trainer.step.roles import Roles
from miles.services.trainer.step.teachers import Teachers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from miles.config import JobConfig
    from miles.precision.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class FsdpRoles(Roles):
    """See `Roles`."""

    policy: FsdpPolicy
    critic: FsdpCritic | None = None
    reference: FrozenModel | AdaptedBase | None = None
    teacher: FrozenModel | Teachers | None = None
    old_policies: OldPolicies | None = None
    routing: Routing | None = None
    """Of the policy; None where it is neither replayed nor observed."""
    adapter: Adapter | None = None
    """The adapter that is trained; None when the whole policy is."""

    @property
    def models(self) -> list[torch.nn.Module]:
        """Every model that is held, trained or not, each once."""
        learners = [learner.model for learner in (self.policy, self.critic) if learner is not None]
        teachers = list(self.teacher.roles.values()) if isinstance(self.teacher, Teachers) else [self.teacher]
        frozen = [role.model for role in (self.reference, *teachers) if isinstance(role, FrozenModel)]
        return [*learners, *frozen]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the models that are trained."""
        return [learner.optimizer for learner in (self.policy, self.critic) if learner is not None]


def build_roles(config: JobConfig, device: torch.device) -> FsdpRoles:
    """Load and place every model; collective. Raises FileNotFoundError for a folder without one."""
    if config.rollout.hf_checkpoint is None:
        raise ValueError("hf_checkpoint is not set; it names the Hugging Face folder to start from")
    return _Builder(config, device).roles(config.rollout.hf_checkpoint)


class _Builder:
    def __init__(self, config: JobConfig, device: torch.device) -> None:
        compute = algorithm_options.DTYPES[config.train.train_dtype]
        self._config = config
        self._device = device
        self._recipe = training_recipe(config)
        """Of the policy and of its reference; critics and teachers compute in train_dtype."""
        self._precision = Precision(master=torch.float32 if config.train.keep_fp32_master else compute, compute=compute)
        self._options = ForwardOptions(
            device=device,
            compute=compute,
            temperature=config.rollout.rollout_temperature,
            chunk_rows=config.train.log_probs_chunk_size if config.train.log_probs_chunk_size > 0 else None,
            varlen={"auto": None, "varlen": True, "sdpa": False}[config.train.attn_implementation],
        )

    def roles(self, model_dir: str) -> FsdpRoles:
        config, algorithm = self._config, self._config.algorithm
        # A base that is never updated is held as it is computed with.
        precision = (
            Precision(self._options.compute, self._options.compute) if config.lora.lora_rank else self._precision
        )
        model = self._trainable(model_dir, precision)
        adapter = adapt(model, config) if config.lora.lora_rank else None
        has_routing = algorithm.use_routing_replay or config.rollout.records_routing
        routing = Routing(config, model, self._device) if has_routing else None
        weights = self._place(model, precision, recipe=self._recipe)
        policy = FsdpPolicy(
            model,
            weights,
            LogProbForward(
                self._options,
                with_entropy=algorithm.entropy_coef != 0 or algorithm.observe_training_entropy,
                entropy_requires_grad=algorithm.entropy_coef != 0,
            ),
            config.optimizer,
            algorithm_options.policy_iterations(config),
            scale_loss=self._precision.compute is torch.float16,
            one_graph=config.train.torch_compile,
            routing=routing,
        )
        reference: FrozenModel | AdaptedBase | None = None
        if algorithm_options.needs_reference(config) and adapter is not None:
            reference = AdaptedBase(model, weights, LogProbForward(self._options), routing)
        elif algorithm_options.needs_reference(config):
            reference = self._frozen(config.checkpoint.ref_load or model_dir, model, recipe=self._recipe)
        teacher = self._teacher(model)
        critic = (
            self._critic(config.checkpoint.critic_load or model_dir) if algorithm_options.needs_critic(config) else None
        )
        old_policies = None
        if algorithm.keep_old_actor:
            own = functools.partial(local_weights, model, trained_only=adapter is not None)
            old_policies = OldPolicies(own, policy.compute_log_probs, config.rollout.max_weight_staleness)
        return FsdpRoles(
            policy=policy,
            critic=critic,
            reference=reference,
            teacher=teacher,
            old_policies=old_policies,
            routing=routing,
            adapter=adapter,
        )

    def _critic(self, folder: str) -> FsdpCritic:
        config = self._config
        model = self._trainable(folder, self._precision)
        put_value_head(model, folder)
        weights = self._place(model, self._precision)
        return FsdpCritic(
            model,
            weights,
            ValueForward(self._options),
            algorithm_options.critic_optimizer(config),
            algorithm_options.critic_iterations(config),
            scale_loss=self._precision.compute is torch.float16,
        )

    def _trainable(self, folder: str, precision: Precision) -> PreTrainedModel:
        checkpointing = self._config.train.gradient_checkpointing
        return load_hf_model(folder, precision.master, gradient_checkpointing=checkpointing)

    def _teacher(self, policy: torch.nn.Module) -> FrozenModel | Teachers | None:
        """The teacher; several stay in host memory and are gathered layer by layer while they are asked."""
        folders = self._config.distillation.teacher_folders
        on_host = len(folders) > 1 and self._device.type == "cuda"
        roles = {name: self._frozen(path, policy, on_host=on_host) for name, path in folders.items()}
        return Teachers(roles, self._config.distillation) if len(roles) > 1 else next(iter(roles.values()), None)

    def _frozen(
        self,
        folder: str | pathlib.Path,
        policy: torch.nn.Module,
        *,
        on_host: bool = False,
        recipe: Recipe | None = None,
    ) -> FrozenModel:
        compute = self._precision.compute
        model = load_hf_model(folder, compute, gradient_checkpointing=False)
        model.requires_grad_(False)
        weights = self._place(model, Precision(compute, compute), on_host=on_host, recipe=recipe)
        return FrozenModel(model, weights, LogProbForward(self._options), policy, frees=on_host)

    def _place(
        self, model: PreTrainedModel, precision: Precision, *, on_host: bool = False, recipe: Recipe | None = None
    ) -> WorkingWeights:
        put_scoring_head(model)
        if self._config.train.torch_compile:
            compile_layers(model)
        elif self._device.type == "cuda" and dist.get_world_size() == 1:  # other ranks have no weights to compare with
            fuse_norms(model)
        cpu_offload = on_host or self._config.train.fsdp_cpu_offload
        return place(model, precision, self._device, cpu_offload=cpu_offload, recipe=recipe)

"""The policy in Megatron-Core, built from a Hugging Face checkpoint by megatron-bridge."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from miles.config.notes.megatron import WITH_ENGINE_ALONE
from miles.megatron_checkpoint import tensors_of
from miles.services.trainer.backends.megatron.checkpoint.weights_only import load_weights
from miles.services.trainer.backends.megatron.model.critic import VALUE_HEAD, load_critic
from miles.services.trainer.backends.megatron.model.data_parallel import data_parallel
from miles.services.trainer.backends.megatron.model.expert_layers import (
    computes_grouped,
    expert_values,
    prepare_routers,
)
from miles.services.trainer.backends.megatron.model.transformer_engine import choose_kernels, uses_transformer_engine
from miles.services.trainer.backends.megatron.mtp.layers import add_mtp_layers
from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank
from miles.services.trainer.backends.megatron.precision.choice import LowPrecision, low_precision
from miles.services.trainer.backends.megatron.precision.covered import apply_recipe
from miles.services.trainer.backends.megatron.precision.kernels import engine_values
from miles.services.trainer.checkpoint.initial_weights import initial_weights

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.config.sections.numerics import NumericsConfig


@dataclasses.dataclass(frozen=True, slots=True)
class MegatronModel:
    """This rank's part of the model."""

    bridge: Any
    """megatron.bridge.AutoBridge of the Hugging Face checkpoint."""
    config: Any
    """The TransformerConfig that all chunks share."""
    chunks: list[Any]
    """One for each virtual pipeline stage of this rank, wrapped in DistributedDataParallel."""
    vocabulary: int
    """Tokens of the model without padding."""

    @property
    def bare_chunks(self) -> list[Any]:
        """The chunks without wrappers."""
        return unwrapped(self.chunks)

    def parameters(self) -> list[tuple[str, torch.Tensor]]:
        """Name and tensor of this rank's parameters and persistent buffers, in a fixed order."""
        found = []
        for index, chunk in enumerate(self.bare_chunks):
            persistent = set(chunk.state_dict(keep_vars=True))
            found += [(f"{index}.{name}", parameter) for name, parameter in chunk.named_parameters()]
            found += [(f"{index}.{name}", buffer) for name, buffer in chunk.named_buffers() if name in persistent]
        return found

    def gradient_buffers(self) -> Iterator[torch.Tensor]:
        """The memory in which gradients are added up."""
        for chunk in self.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data


def unwrapped(chunks: list[Any]) -> list[Any]:
    """Chunks without wrappers."""
    from megatron.core.utils import unwrap_model

    bare: list[Any] = unwrap_model(chunks)
    return bare


def build_model(
    config: JobConfig,
    parallel: ParallelRank,
    compute: torch.dtype,
    *,
    wrap: bool = True,
    critic_from: str | None = None,
) -> MegatronModel:
    """Build this rank's part of the policy, or of a critic from a folder, and load its weights; collective.

    Raises FileNotFoundError when there is no checkpoint and ValueError for a model that the bridge does not know.
    """
    from megatron.core.transformer.module import Float16Module

    folder = pathlib.Path(str(config.rollout.hf_checkpoint))
    weights = pathlib.Path(critic_from or initial_weights(config))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {folder}: there is no config.json; set hf_checkpoint to a Hugging Face folder"
        )
    with_engine = uses_transformer_engine(config)
    if with_engine:
        choose_kernels()
    bridge = _bridge(folder, grouped=computes_grouped(config.moe, with_engine=with_engine))
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.perform_initialization = False
    low = low_precision(config) if critic_from is None else None  # critics compute in train_dtype
    load = functools.partial(_complete_and_load, bridge, config, weights, low, critic_from is not None)
    provider.register_pre_wrap_hook(load if critic_from is None else functools.partial(load_critic, load, critic_from))
    _configure(provider, config, parallel, compute, low)
    if critic_from is not None:
        provider.share_embeddings_and_output_weights = False
        provider.moe_enable_routing_replay = False
    provider.finalize()
    chunks = provider.provide_distributed_model(
        wrap_with_ddp=False,
        fp16=compute is torch.float16,
        bf16=compute is torch.bfloat16,
        use_cpu_initialization=config.services.device == "cpu",
        mixed_precision_wrapper=Float16Module,
    )
    if wrap:
        chunks = data_parallel(chunks, config.megatron)
    return MegatronModel(bridge, provider, chunks, provider.vocab_size)


def _bridge(folder: pathlib.Path, *, grouped: bool) -> Any:
    from miles.services.trainer.backends.megatron.model.bridge import LayerBridge, SingleExpertBridge

    kind = LayerBridge if grouped else SingleExpertBridge
    return kind.from_folder(folder)


def _complete_and_load(
    bridge: Any,
    config: JobConfig,
    weights: pathlib.Path,
    low: LowPrecision | None,
    is_critic: bool,
    chunks: list[Any],
) -> list[Any]:
    """Add the policy's MTP layers; read a Hugging Face folder or a torch_dist checkpoint into bare chunks.

    Their layers compute as `low` says.

    Raises ValueError for parameters that the bridge cannot fill.
    """
    layout = config.megatron
    if layout.mtp_num_layers is not None and not is_critic:
        for chunk in chunks:
            add_mtp_layers(
                chunk,
                layout.mtp_num_layers,
                with_engine=uses_transformer_engine(config),
                trained=layout.enable_mtp_training,
            )
    prepare_routers(config.moe, chunks[0].config, chunks)
    tasks = bridge.get_conversion_tasks(chunks)
    if any(task is None for task in tasks):
        architecture = type(bridge.hf_pretrained.config).__name__.removesuffix("Config")
        raise ValueError(
            f"megatron-bridge knows no names for some parameters of {architecture} in these layers; install "
            "TransformerEngine and set transformer_impl to transformer_engine, or use train_backend fsdp"
        )
    if low is not None:
        apply_recipe(low, chunks[0].config, tasks)
    read_weights(bridge, weights, chunks, but=VALUE_HEAD if is_critic else None)
    if config.lora.lora_rank and not is_critic:
        from miles.services.trainer.backends.megatron.lora.adapter import attach

        attach(config.lora, config.train.seed, chunks)
    return chunks


def read_weights(bridge: Any, folder: pathlib.Path, chunks: list[Any], *, but: str | None = None) -> None:
    """Fill chunks with a model's weights; collective. See `load_weights` for checkpoints, and for `but`."""
    if (checkpoint := tensors_of(folder)) is not None:
        load_weights(checkpoint, unwrapped(chunks), but=but)
    else:
        bridge.load_hf_weights(chunks, hf_path=str(folder))


def _configure(
    provider: Any, config: JobConfig, parallel: ParallelRank, compute: torch.dtype, low: LowPrecision | None
) -> None:
    """Fill in the provider's fields, which are those of Megatron-Core's TransformerConfig and GPTModel."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnBackend

    layout = config.megatron
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    with_engine = uses_transformer_engine(config)
    values: dict[str, Any] = {
        "params_dtype": compute,
        "pipeline_dtype": compute,
        "autocast_dtype": compute,
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual,
        "num_layers_in_first_pipeline_stage": layout.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": layout.decoder_last_pipeline_num_layers,
        "account_for_embedding_in_pipeline_split": layout.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": layout.account_for_loss_in_pipeline_split,
        "pipeline_model_parallel_layout": layout.pipeline_model_parallel_layout,
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
        "sequence_parallel": layout.sequence_parallel and layout.tensor_model_parallel_size > 1,
        # Micro-batches differ in length; with the dispatcher allgather only where it does not matter.
        "variable_seq_lengths": config.moe.moe_token_dispatcher_type != "allgather",
        "calculate_per_token_loss": True,  # gradients are sums; the loss has its denominator already
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 1,  # Megatron multiplies it by the tensor-parallel size
        "attention_dropout": 0.0,  # old and new log-probabilities must come from the same function
        "hidden_dropout": 0.0,
        "recompute_granularity": layout.recompute_granularity,
        "recompute_method": layout.recompute_method,
        "recompute_num_layers": layout.recompute_num_layers,
        "recompute_modules": _recomputed(config, with_engine=with_engine),
        "cross_entropy_loss_fusion": False,
        "gradient_accumulation_fusion": False,  # the head would need an extension of APEX, which no package brings
        "deterministic_mode": config.train.deterministic_mode,
        "mtp_num_layers": None,  # they are added when the rest is built
        "mtp_enabled": False,
        "mtp_detach_heads": True,
    }
    values |= expert_values(config.moe, with_engine=with_engine, replays=wants_replay(config))
    if low is not None and low.by_engine:
        values |= engine_values(config.precision, low.recipe)
    if virtual is not None:
        values |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if with_engine:
        values |= _fused_kernels(provider) | unwanted_kernels(config.numerics)
    else:
        if getattr(provider, "multi_latent_attention", False) and layout.tensor_model_parallel_size > 1:
            raise ValueError("multi-head latent attention needs TransformerEngine for tensor_model_parallel_size > 1")
        values |= dict.fromkeys(_NEEDS_TRANSFORMER_ENGINE, False)
        values["transformer_impl"] = "local"
    for name, value in values.items():
        if hasattr(provider, name):
            setattr(provider, name, value)
    provider.transformer_layer_spec = _layer_spec(provider.transformer_layer_spec, with_engine=with_engine)
    if not with_engine:
        provider.attention_backend = AttnBackend.auto  # some families name one of TransformerEngine's
    elif layout.attention_backend != "auto":
        provider.attention_backend = AttnBackend[layout.attention_backend]


def _recomputed(config: JobConfig, *, with_engine: bool) -> list[str]:
    """The parts of layers to recompute, without those that these layers cannot."""
    unable = set() if with_engine else set(WITH_ENGINE_ALONE)
    if not computes_grouped(config.moe, with_engine=with_engine):
        unable.add("moe_act")
    return [name for name in config.megatron.recompute_modules if name not in unable]


def _layer_spec(spec: Any, *, with_engine: bool) -> Any:
    """What makes the layers of a model whose provider makes them by `spec`."""
    from megatron.bridge.models.minimax_m2.minimax_m2_provider import minimax_m2_layer_spec

    from miles.services.trainer.backends.megatron.layers.all_heads_norm import with_all_heads_norms
    from miles.services.trainer.backends.megatron.layers.local_layers import local_spec_like

    if not with_engine:
        return local_spec_like(spec)
    return with_all_heads_norms(spec) if spec is minimax_m2_layer_spec else spec


def _fused_kernels(provider: Any) -> dict[str, bool]:
    """Settings of kernels that some families' providers leave off, where the model has what they compute.

    Without a fused kernel, rotary embeddings of packed sequences wait for the GPU and launch some kernels for every
    sequence of every layer.
    """
    latent = bool(getattr(provider, "multi_latent_attention", False))
    experts = provider.num_moe_experts is not None
    fused = {"bias_dropout_fusion": not (experts and provider.add_bias_linear)}
    if provider.position_embedding_type == "rope" and not latent:
        fused["apply_rope_fusion"] = True
    if provider.gated_linear_unit and provider.activation_func is torch.nn.functional.silu:
        fused["bias_activation_fusion"] = True
    return fused


def unwanted_kernels(numerics: NumericsConfig) -> dict[str, bool]:
    """Settings of fused kernels that the configuration turns off."""
    wanted = {
        "apply_rope_fusion": numerics.apply_rope_fusion,
        "bias_activation_fusion": numerics.bias_swiglu_fusion,
        "bias_dropout_fusion": numerics.bias_dropout_fusion,
        "masked_softmax_fusion": numerics.masked_softmax_fusion,
    }
    return {name: False for name, is_wanted in wanted.items() if not is_wanted}


_NEEDS_TRANSFORMER_ENGINE = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


def wants_replay(config: JobConfig) -> bool:
    """Whether the configuration replays routing, so that routers' choices are prescribed."""
    return config.algorithm.use_routing_replay or config.rollout.use_rollout_routing_replay

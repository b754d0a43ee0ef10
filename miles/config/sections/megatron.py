"""How the Megatron-Core backend spreads the model; the names are Megatron's."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Derived, NonNegativeFloat, Positive, PositiveFloat, Section, derived


class MegatronConfig(Section):
    """Layout of the model over ranks and how it is computed, for train_backend megatron."""

    tensor_model_parallel_size: Positive = 1
    """Ranks that split each matrix."""

    pipeline_model_parallel_size: Positive = 1
    """Stages of consecutive layers."""

    num_virtual_stages_per_pipeline_rank: Positive | None = None
    """Pieces that each stage is cut into, for an interleaved schedule."""

    context_parallel_size: Positive = 1
    """Ranks that split each sequence."""

    expert_model_parallel_size: Positive = 1
    """Ranks that split the experts of a layer; taken out of the data-parallel ranks."""

    expert_tensor_parallel_size: Annotated[
        Positive, Derived("1 when expert_model_parallel_size is above 1, else tensor_model_parallel_size")
    ] = derived()
    """Ranks that split each expert's matrices."""

    sequence_parallel: bool = False
    """Split activations outside matrix products over the tensor-parallel ranks."""

    use_distributed_optimizer: bool = False
    """Split the optimizer's state over the data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass goes on; needs use_distributed_optimizer."""

    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layers of TransformerEngine, or Megatron-Core's own with plain PyTorch attention; `auto` is the first where it is
    installed."""

    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """Attention kernels of TransformerEngine."""

    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to their experts."""

    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss."""

    mtp_num_layers: Positive | None = None
    """Layers for multi-token prediction that the model has and the trainer is to hold; not given leaves them out, and
    Hugging Face folders get those of hf_checkpoint."""

    enable_mtp_training: bool = False
    """Train them too, on the same tokens; neither embeddings nor the other layers get a gradient of it."""

    mtp_loss_scaling_factor: PositiveFloat = 0.2
    """Weight of their loss."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers in the backward pass, or only what recompute_modules names."""

    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers: uniform takes runs of recompute_num_layers, block the first recompute_num_layers of a stage."""

    recompute_num_layers: Positive | None = None
    """See recompute_method."""

    recompute_modules: tuple[str, ...] = ("core_attn",)
    """Parts of a layer to recompute with granularity selective."""

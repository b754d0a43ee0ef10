"""Parallel layout and options of the Megatron-Core backend, under Megatron's names."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Derived, Positive, PositiveFloat, Section, States, derived


class MegatronConfig(Section):
    """Parallel layout and computation of the model, for train_backend megatron."""

    tensor_model_parallel_size: Positive = 1
    """Tensor-parallel size: ranks that split each matrix."""

    pipeline_model_parallel_size: Positive = 1
    """Pipeline-parallel size: stages of consecutive layers."""

    num_virtual_stages_per_pipeline_rank: Positive | None = None
    """Virtual stages per pipeline stage, for the interleaved schedule."""

    num_layers_per_virtual_pipeline_stage: Positive | None = None
    """The same, given by the layers of each virtual stage."""

    decoder_first_pipeline_num_layers: Positive | None = None
    """Layers of the first pipeline stage; the others are split evenly over the other stages."""

    decoder_last_pipeline_num_layers: Positive | None = None
    """Layers of the last pipeline stage; the others are split evenly over the other stages."""

    account_for_embedding_in_pipeline_split: bool = False
    """Count the embeddings as a layer of the first pipeline stage, which then has one less."""

    account_for_loss_in_pipeline_split: bool = False
    """Count the head and the loss as a layer of the last pipeline stage, which then has one less."""

    pipeline_model_parallel_layout: str | None = None
    """Layers of each stage, first all first virtual stages, then all second ones: E (embeddings), t (a layer) and L
    (head and loss), stages separated by |, with (…)*n and t*n for repetitions, e.g. `Et*3|(tt|)*2tL`."""

    context_parallel_size: Positive = 1
    """Context-parallel size: ranks that split each sequence."""

    expert_model_parallel_size: Positive = 1
    """Expert-parallel size: data-parallel ranks that split the experts of a layer."""

    expert_tensor_parallel_size: Annotated[
        Positive, Derived("1 when expert_model_parallel_size is above 1, else tensor_model_parallel_size")
    ] = derived()
    """Expert tensor-parallel size: ranks that split each expert's matrices."""

    sequence_parallel: Annotated[
        bool, Derived("on when tensor_model_parallel_size and expert_model_parallel_size are above 1")
    ] = derived()
    """Sequence parallelism: split activations outside matrix products over the tensor-parallel ranks."""

    use_distributed_optimizer: Annotated[bool, Derived("on with use_precision_aware_optimizer")] = derived()
    """Shard the optimizer state over the data-parallel ranks."""

    use_precision_aware_optimizer: Annotated[bool, Derived("on with optimizer_cpu_offload")] = derived()
    """Have Adam itself hold the float32 masters of 16-bit parameters, in host memory with optimizer_cpu_offload, and
    moments in exp_avg_dtype and exp_avg_sq_dtype without; needs CUDA, and without offloading TransformerEngine."""

    main_grads_dtype: Annotated[
        Literal["fp32", "bf16"] | None, States("fp32", "gradients are summed and kept in float32")
    ] = None
    """Data type of gradients in the optimizer."""

    main_params_dtype: Annotated[
        Literal["fp32", "fp16"] | None, States("fp32", "master parameters have the precision of float32")
    ] = None
    """Data type of master parameters."""

    exp_avg_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Data type of Adam's first moment, with use_precision_aware_optimizer on the GPU."""

    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Data type of Adam's second moment, with use_precision_aware_optimizer on the GPU."""

    optimizer_cpu_offload: bool = False
    """Hold master parameters and Adam's moments in pinned host memory, and update them on the CPU (CUDA)."""

    optimizer_offload_fraction: Annotated[
        float | None,
        States(1.0, "optimizer_cpu_offload moves all of the state, as a part left on the GPU is not restored exactly"),
    ] = None
    """Fraction of the parameters whose optimizer state optimizer_cpu_offload moves."""

    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Overlap the copies of gradients and parameters with the CPU's update of others (optimizer_cpu_offload)."""

    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients with the backward pass."""

    overlap_param_gather: bool = False
    """Overlap the all-gather of updated parameters with the forward pass; requires use_distributed_optimizer."""

    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Implementation of layers: TransformerEngine, or Megatron-Core's own with PyTorch attention (local); `auto` uses
    TransformerEngine where it is installed."""

    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """Attention kernels of TransformerEngine."""

    attention_softmax_in_fp32: Annotated[
        bool | None, States(True, "the softmax of attention is computed in float32")
    ] = None
    """Compute the softmax of attention in float32."""

    gradient_accumulation_fusion: Annotated[
        bool | None, States(False, "products of the backward pass are added to float32 gradients by PyTorch")
    ] = None
    """Add gradients of weights to float32 buffers within the matrix product (APEX)."""

    megatron_to_hf_mode: Literal["raw", "bridge"] = "raw"
    """What converts weights between Megatron-Core and Hugging Face names; megatron-bridge does in either mode."""

    mtp_num_layers: Positive | None = None
    """Number of the model's MTP (multi-token prediction) layers to load; not given loads none, and exports contain
    those of hf_checkpoint."""

    enable_mtp_training: bool = False
    """Train the MTP layers on the same tokens, without gradients to the embeddings and the other layers."""

    mtp_loss_scaling_factor: PositiveFloat = 0.2
    """Coefficient of the MTP loss."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recomputation in the backward pass: whole layers (full), or recompute_modules (selective)."""

    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers to recompute: uniform groups of recompute_num_layers, or a block of the first ones of each stage."""

    recompute_num_layers: Positive | None = None
    """Number of layers of recompute_method."""

    recompute_modules: tuple[str, ...] = ("core_attn",)
    """Parts of a layer to recompute with recompute_granularity selective."""

    cross_entropy_loss_fusion: Annotated[
        bool | None, States(False, "losses are of log-probabilities, which Megatron-Core's cross entropy does not give")
    ] = None
    """Compute Megatron-Core's cross entropy in a fused kernel."""

    overlap_moe_expert_parallel_comm: Annotated[
        bool | None, States(False, "the schedule that overlaps it gives logits of all rows, not of responses alone")
    ] = None
    """Overlap communication of expert parallelism with other micro-batches."""

    delay_wgrad_compute: Annotated[
        bool | None, States(False, "it needs overlap_moe_expert_parallel_comm, which is not there")
    ] = None
    """Compute gradients of weights after those of activations."""

    enable_cuda_graph: Annotated[
        bool | None, States(False, "a CUDA graph has fixed shapes, and micro-batches differ in length")
    ] = None
    """Run layers as CUDA graphs of Megatron-Core."""

    external_cuda_graph: Annotated[
        bool | None, States(False, "a CUDA graph has fixed shapes, and micro-batches differ in length")
    ] = None
    """Run layers as CUDA graphs of TransformerEngine."""

    cuda_graph_impl: Literal["none", "local", "transformer_engine", "full_iteration"] = "none"
    """Kind of CUDA graphs; others than none are refused."""

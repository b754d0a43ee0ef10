"""The training backend: model, precision, batches and micro-batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.schema.section import Derived, Positive, Section, States, derived


class TrainConfig(Section):
    """Training backend, precision, and the division of a rollout into optimizer steps and micro-batches."""

    train_backend: Literal["auto", "fsdp", "megatron"] = "auto"
    """Training backend; auto takes the one that other settings ask for, and otherwise megatron on a machine with a
    GPU, megatron-core and megatron-bridge, and fsdp elsewhere."""

    seed: int = 1234
    """Random seed of the trainer."""

    attn_implementation: Literal["auto", "varlen", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention over packed samples (fsdp): varlen is variable-length flash attention (CUDA, 16-bit), sdpa runs
    everywhere, and `auto` is varlen where it is supported, for which flash_attention_2 and flash_attention_3 stand."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them (fsdp)."""

    torch_compile: bool = False
    """Compile the decoder layers with torch.compile: fewer and larger kernels, after a first step that waits for the
    compiler (fsdp, one CUDA GPU, 16-bit, dense models without adapters and low-precision formats)."""

    fp16: bool = False
    """Same as train_dtype = float16."""

    bf16: bool = False
    """Same as train_dtype = bfloat16."""

    deterministic_mode: bool = False
    """Compute with deterministic kernels on GPUs too, where PyTorch and TransformerEngine have some; others are warned
    of in the trainer's log. On a CPU they always are."""

    train_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], Derived("float16 with fp16, bfloat16 with bf16, else auto")
    ] = derived()
    """Data type in which the trainer computes, with gradients accumulated in float32; auto uses rollout_dtype, which is
    decided at the start of the run if it is auto too."""

    keep_fp32_master: bool = True
    """Keep float32 master parameters and cast them for computation."""

    fsdp_cpu_offload: bool = False
    """Offload parameters, gradients and optimizer state to host memory between uses (fsdp)."""

    qkv_format: Literal["thd", "bshd"] = "thd"
    """Layout of a micro-batch: thd packs samples without padding, bshd pads each to the longest (megatron)."""

    log_probs_chunk_size: int = -1
    """Number of rows of logits that are held in float32 at a time when log-probabilities are computed; -1 means as many
    as make up 16 MiB on a CPU and 256 MiB on a GPU."""

    train_env_vars: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the trainer's processes, a JSON object."""

    global_batch_size: Annotated[
        Positive, Derived("rollout_batch_size × n_samples_per_prompt / num_steps_per_rollout")
    ] = derived()
    """Number of samples per optimizer step."""

    num_steps_per_rollout: Annotated[
        Positive, Derived("rollout_batch_size × n_samples_per_prompt / global_batch_size; 1 when neither is given")
    ] = derived()
    """Number of optimizer steps per rollout."""

    micro_batch_size: Positive = 1
    """Number of samples per micro-batch, without use_dynamic_batch_size."""

    use_dynamic_batch_size: bool = False
    """Form micro-batches by tokens: as many samples as fit into max_tokens_per_gpu."""

    max_tokens_per_gpu: Positive | None = None
    """Maximum number of tokens per micro-batch and trainer process, with use_dynamic_batch_size."""

    log_probs_max_tokens_per_gpu: Annotated[Positive | None, Derived("max_tokens_per_gpu")] = None
    """Maximum number of tokens per micro-batch in passes that only compute log-probabilities."""

    balance_data: Annotated[
        bool | None, States(True, "samples are dealt over data-parallel ranks by their tokens (Karmarkar–Karp)")
    ] = None
    """Deal samples over data-parallel ranks so that each has nearly as many tokens."""

    skip_actor_forward_only: bool = False
    """State that old log-probabilities are those of the training pass, as they are with one optimizer step per
    rollout."""

    reset_optimizer_states: bool = False
    """Set Adam's moments and its count of steps to 0 after each rollout."""

    share_prompts: Annotated[bool, Derived("on with fsdp, off with megatron")] = derived()
    """Compute what a group's samples have in common from the beginning, the prompt above all, only once per micro-batch
    (fsdp)."""

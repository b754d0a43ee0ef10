"""The training backend: model, precision, batches and micro-batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.schema.section import Derived, Positive, Section, derived


class TrainConfig(Section):
    """How the trainer holds the model and cuts its work into optimizer steps and micro-batches."""

    train_backend: Literal["fsdp", "megatron"] = "fsdp"
    """What holds and trains the policy."""

    seed: int = 1234
    """Seed of the trainer."""

    attn_implementation: Literal["auto", "varlen", "sdpa"] = "auto"
    """Attention over packed samples: varlen is variable-length flash attention (CUDA, 16-bit), sdpa runs everywhere;
    `auto` is varlen where it runs."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them (fsdp)."""

    fp16: bool = False
    """Compute in float16: the same as train_dtype = float16."""

    train_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], Derived("float16 with fp16, else auto")
    ] = derived()
    """Type in which the trainer computes; gradients are summed up in float32. With auto it is that of rollout_dtype,
    which is decided when the run starts if it is auto too."""

    keep_fp32_master: bool = True
    """Hold parameters in float32 and cast them for computing."""

    fsdp_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory between uses."""

    qkv_format: Literal["thd"] = "thd"
    """Layout of a micro-batch: thd packs samples one after another without padding."""

    log_probs_chunk_size: int = -1
    """Rows of logits turned into log-probabilities at a time; -1 takes them all at once."""

    train_env_vars: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the trainer's processes, a JSON object."""

    global_batch_size: Annotated[
        Positive, Derived("rollout_batch_size × n_samples_per_prompt / num_steps_per_rollout")
    ] = derived()
    """Samples per optimizer step."""

    num_steps_per_rollout: Annotated[
        Positive, Derived("rollout_batch_size × n_samples_per_prompt / global_batch_size; 1 when neither is given")
    ] = derived()
    """Optimizer steps per rollout."""

    micro_batch_size: Positive = 1
    """Samples per micro-batch, when micro-batches are not cut by tokens."""

    use_dynamic_batch_size: bool = False
    """Cut micro-batches by tokens: as many samples as fit into max_tokens_per_gpu."""

    max_tokens_per_gpu: Positive | None = None
    """Tokens per micro-batch and trainer process, with use_dynamic_batch_size."""

    log_probs_max_tokens_per_gpu: Annotated[Positive | None, Derived("max_tokens_per_gpu")] = None
    """The same for passes that only compute log-probabilities."""

    share_prompts: Annotated[bool, Derived("on with fsdp, off with megatron")] = derived()
    """Hold the prompt of a group's samples once per micro-batch; its rows are computed once for all of them."""

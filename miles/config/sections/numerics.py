"""Flags of Megatron about kernels and numbers that launch scripts pass along, most of which state what is so."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Ignored, Negated, Positive, Section, States


class NumericsConfig(Section):
    """Kernels and numbers of Megatron."""

    accumulate_allreduce_grads_in_fp32: Annotated[
        bool | None, States(True, "gradients are added up and reduced in float32")
    ] = None
    """Add up and reduce gradients in float32."""

    hidden_dropout: Annotated[
        float | None, States(0.0, "nothing is dropped, so that trainer and engine compute the same function")
    ] = None
    """Dropout of hidden states."""

    attention_dropout: Annotated[
        float | None, States(0.0, "nothing is dropped, so that trainer and engine compute the same function")
    ] = None
    """Dropout of attention."""

    apply_rope_fusion: Annotated[bool, Negated("--no-rope-fusion")] = True
    """Use the fused kernel of rotary positions, where layers are TransformerEngine's and have one."""

    bias_swiglu_fusion: Annotated[bool, Negated("--no-bias-swiglu-fusion")] = True
    """Use the fused kernel of gated activations, where layers are TransformerEngine's."""

    bias_dropout_fusion: Annotated[bool, Negated("--no-bias-dropout-fusion")] = True
    """Use the fused kernel that adds biases and residuals, where layers are TransformerEngine's."""

    masked_softmax_fusion: Annotated[bool, Negated("--no-masked-softmax-fusion")] = True
    """Use the fused softmax of unfused attention, where layers are TransformerEngine's."""

    use_flash_attn: bool = False
    """Same as attention_backend = flash."""

    cp_comm_type: Annotated[
        tuple[str, ...] | None,
        Ignored("the layers choose how context-parallel ranks exchange keys and values, with the same result"),
    ] = None
    """How context-parallel ranks exchange keys and values."""

    allgather_cp: Annotated[
        bool | None, Ignored("each context-parallel rank has two chunks of a sequence, with the same result")
    ] = None
    """Cut sequences into one chunk for each context-parallel rank."""

    enable_experimental: Annotated[
        bool | None, Ignored("features of Megatron-Core that need permission are not used")
    ] = None
    """Permit experimental features of Megatron-Core."""

    check_for_nan_in_loss_and_grad: Annotated[
        bool | None,
        Negated("--no-check-for-nan-in-loss-and-grad"),
        Ignored("the norm of the gradient, which is computed anyway, is always checked before a step"),
    ] = None
    """Check that losses and gradients are numbers."""

    ref_micro_batch_size: Annotated[
        Positive | None, Ignored("the reference computes the policy's micro-batches, with the same result")
    ] = None
    """Number of samples in a micro-batch of the reference."""

    true_on_policy_mode: Annotated[
        bool | None, States(False, "kernels of trainer and engine are not the same, so their log-probabilities differ")
    ] = None
    """Have trainer and engine compute bit-identical log-probabilities."""

    recompute_logprobs_via_prefill: Annotated[
        bool | None, States(False, "log-probabilities are those with which the engine sampled")
    ] = None
    """Have the engine compute the log-probabilities of finished responses once more."""

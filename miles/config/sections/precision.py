"""Low precision: what the trainer computes in, and what engines hold their weights in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import field_validator

from miles.config.schema.faults import misspelt
from miles.config.schema.section import Metavar, NonNegative, Positive, Section

_NOT_WITH_ENGINES: Mapping[str, str] = {
    "delayed": "its scales are of earlier steps, and engines have none of them",
    "tensorwise": "its scales are of whole tensors, and engines take one for each block of 128 × 128",
    "custom": "its scales are made by code of one's own, and engines have none of it",
}


class PrecisionConfig(Section):
    """Formats of fewer bits than train_dtype and rollout_dtype (docs/precision.md)."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Train in FP8: matrices of decoder layers are multiplied in FP8, under Megatron's name."""

    fp8_recipe: Literal["blockwise", "mxfp8"] | None = None
    """Scales of fp8_format: one for each block of 128 × 128 of a weight and 1 × 128 of its inputs (blockwise), or one
    for 1 × 32 that is a power of two (mxfp8)."""

    fp8_block_scales: Literal["float32", "power_of_two"] | None = None
    """Scales of blockwise FP8: any float32 number, or powers of two; not given is the checkpoint's, or float32 where it
    has none."""

    fp4_format: Literal["e2m1"] | None = None
    """Train in FP4, under Megatron's name."""

    fp4_recipe: Literal["nvfp4"] | None = None
    """Scales of fp4_format: one in E4M3 for each 1 × 16, and one for the tensor."""

    int4_qat: bool = False
    """Train with weights that are rounded to INT4 in the forward pass, with straight-through gradients."""

    int4_group_size: Positive | None = None
    """Elements of a row that share a scale in INT4; not given is the checkpoint's, or 128 where it has none."""

    int4_layers: tuple[str, ...] = (".experts.",)
    """Parts of the names of weights that INT4 covers; by default the routed experts, and `.` covers every matrix of
    decoder layers."""

    low_precision_impl: Literal["auto", "transformer_engine", "emulated"] = "auto"
    """What computes in the trainer's format: TransformerEngine's kernels, or products in train_dtype of numbers that
    are rounded to the format; auto takes TransformerEngine where the layers are its own and the GPU has them."""

    first_last_layers_bf16: bool = False
    """Keep the first and last decoder layers out of the format."""

    num_layers_at_start_in_bf16: NonNegative = 1
    """Number of first decoder layers that first_last_layers_bf16 keeps out."""

    num_layers_at_end_in_bf16: NonNegative = 1
    """Number of last decoder layers that first_last_layers_bf16 keeps out."""

    precision_metrics_interval: NonNegative = 0
    """Number of rollouts from one to the next of which metrics tell, for each decoder layer, the largest magnitudes of
    weights and inputs, scales, underflow, rounding errors, and the difference between the weights that trainer and
    engines compute with; 0 is none."""

    rollout_weight_format: Literal["auto", "as_trained", "fp8_block", "int4", "mxfp8", "nvfp4"] = "auto"
    """Format in which weights are published and served: rollout_dtype (as_trained), FP8 with a scale per block of
    128 × 128 (fp8_block), packed INT4 (int4), or formats of coming GPUs (mxfp8, nvfp4; torch engine alone). auto is
    what config.json of hf_checkpoint says, or else the trainer's format, or else as_trained."""

    extra_high_precision_layers_hf: Annotated[tuple[str, ...], Metavar("PART")] = ()
    """Parts of the names of further weights that are kept out of the formats of trainer and engines."""

    extra_high_precision_layers_megatron: Annotated[tuple[str, ...], Metavar("PART")] = ()
    """The same by Megatron's names of modules, such as .shared_experts.linear_fc1, for any trainer and
    engine."""

    te_precision_config_file: Annotated[str | None, Metavar("FILE")] = None
    """Megatron's YAML file of configs and matchers, or its content after `base64:`: modules that it keeps in high
    precision are kept out of the formats of trainer and engines."""

    @field_validator("fp8_recipe", mode="before")
    @classmethod
    def _say_why_not(cls, value: Any) -> Any:
        """Name the reason for what Megatron-Core has besides."""
        if (why := _NOT_WITH_ENGINES.get(str(value))) is not None:
            raise misspelt(why, "set it to blockwise")
        return value

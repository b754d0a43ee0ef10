"""LoRA: training low-rank adapters instead of all weights."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Derived, Metavar, NonNegative, NonNegativeFloat, Positive, Section


class LoraConfig(Section):
    """LoRA. Modules are named as in PEFT: full names or their last parts, separated by commas."""

    lora_rank: NonNegative = 0
    """Rank of the adapters; 0 trains all weights instead."""

    lora_alpha: Positive = 16
    """LoRA alpha: an adapter adds lora_alpha / lora_rank * B * A to its weight."""

    lora_dropout: NonNegativeFloat = 0.0
    """Must be 0: with dropout the trainer would not compute the function that the engine sampled from."""

    target_modules: Annotated[
        str | None, Derived("what lora_adapter_path adapts, else all-linear"), Metavar("NAME,NAME,...")
    ] = None
    """Linear layers to adapt, e.g. q_proj,v_proj; all-linear adapts all of them except the head."""

    exclude_modules: Annotated[str | None, Metavar("NAME,NAME,...")] = None
    """Linear layers not to adapt."""

    lora_adapter_path: Annotated[str | None, Metavar("DIR")] = None
    """PEFT folder of the adapter to start from, whose rank and alpha must equal lora_rank and lora_alpha."""

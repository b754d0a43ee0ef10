"""Training low-rank adapters instead of the whole policy."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Derived, Metavar, NonNegative, NonNegativeFloat, Positive, Section


class LoraConfig(Section):
    """LoRA (fsdp). Modules are named as for PEFT: whole names or their last parts, separated by commas."""

    lora_rank: NonNegative = 0
    """Rank of the adapters; 0 trains the whole policy."""

    lora_alpha: Positive = 16
    """Adapters add lora_alpha / lora_rank * B * A to each weight."""

    lora_dropout: NonNegativeFloat = 0.0
    """Must be 0: the log-probabilities of a response come from the same function as the response itself."""

    target_modules: Annotated[
        str | None, Derived("what lora_adapter_path adapts, else all-linear"), Metavar("NAME,NAME,...")
    ] = None
    """Linear layers to adapt, like q_proj,v_proj; all-linear is every one of them but the head."""

    exclude_modules: Annotated[str | None, Metavar("NAME,NAME,...")] = None
    """Linear layers to leave out."""

    lora_adapter_path: Annotated[str | None, Metavar("DIR")] = None
    """PEFT folder of the adapter to start from; its rank and alpha must be lora_rank and lora_alpha."""

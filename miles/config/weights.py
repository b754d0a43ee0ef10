"""How new weights reach the engines."""

from __future__ import annotations

from typing import Literal

from miles.config.section import Positive, Section


class WeightsConfig(Section):
    """Publication of weights."""

    update_weight_transfer_mode: Literal["shared_memory"] = "shared_memory"
    """Transport: shared_memory maps a file of this host, without a copy."""

    update_weight_buffer_size: Positive = 512 << 20
    """Size of the buckets in which weights are gathered and sent, in bytes; each rank of the trainer holds two of them
    beside its own part of the model."""

    update_weights_interval: Positive = 1
    """Training steps from one publication of the weights to the next; evaluation gets its version in any case."""

    pause_generation_mode: Literal["retract", "in_place", "abort"] = "retract"
    """What an update does to responses under way: retract computes their keys and values anew, in_place keeps those of
    the old weights, abort hands them back, to be resumed by any rollout."""

    check_weight_update_equal: bool = False
    """After each update, compare what every engine holds with what the trainer sent."""

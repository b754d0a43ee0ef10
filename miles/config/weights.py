"""How new weights reach the engines."""

from __future__ import annotations

from typing import Literal

from miles.config.section import Section


class WeightsConfig(Section):
    """Publication of weights."""

    update_weight_transfer_mode: Literal["shared_memory"] = "shared_memory"
    """Transport: shared_memory maps a file of this host, without a copy."""

    check_weight_update_equal: bool = False
    """After each update, compare what every engine holds with what the trainer sent."""

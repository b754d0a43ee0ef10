"""Inference engines, chosen by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.services.rollout.engine import RolloutEngine

ENGINES = ("torch",)


def create_engine(name: str, **options: Any) -> RolloutEngine:
    """Build the engine called `name` with its own options; nothing is loaded before `start`.

    Raises ValueError for a name that is not in `ENGINES`.
    """
    if name == "torch":
        from miles.services.rollout.engines.torch import TorchEngine

        return TorchEngine(**options)
    raise ValueError(f"unknown rollout backend {name!r}: choose one of {', '.join(ENGINES)}")

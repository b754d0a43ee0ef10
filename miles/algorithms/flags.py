"""Algorithm options from anything that has the flags' names as attributes, such as the job configuration's section."""

from __future__ import annotations

import dataclasses
from typing import Any

from miles.algorithms.corrections import CorrectionMethod, TruncatedImportanceSampling
from miles.algorithms.estimators import ESTIMATORS, AdvantageConfig
from miles.algorithms.losses import LossConfig


def advantage_config(flags: Any, **overrides: Any) -> AdvantageConfig:
    """`AdvantageConfig` from flags; an attribute that `flags` lacks keeps its default, `overrides` win."""
    return AdvantageConfig(**_fields(AdvantageConfig, flags) | overrides)


def loss_config(flags: Any, *, correction: CorrectionMethod | None = None, **overrides: Any) -> LossConfig:
    """`LossConfig` from flags.

    The policy loss is the one that the advantage estimator goes with. `use_tis` gives truncated importance sampling
    with the flags' bounds unless `correction` names another method.
    """
    fields = _fields(LossConfig, flags)
    fields["policy_loss"] = ESTIMATORS[getattr(flags, "advantage_estimator", "grpo")].policy_loss
    if correction is None and getattr(flags, "use_tis", False):
        correction = TruncatedImportanceSampling(
            tis_clip=getattr(flags, "tis_clip", 2.0), tis_clip_low=getattr(flags, "tis_clip_low", 0.0)
        )
    return LossConfig(**fields | {"correction": correction} | overrides)


def _fields(config: type[AdvantageConfig] | type[LossConfig], flags: Any) -> dict[str, Any]:
    return {f.name: getattr(flags, f.name) for f in dataclasses.fields(config) if hasattr(flags, f.name)}

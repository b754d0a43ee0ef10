"""What the settings of a policy loss may be, and what the loss is like; rules and notes ask it.

A policy loss is a registered function in `miles.algorithms`, and an entry in `POLICY_LOSS_SPECS`.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Literal

PolicyLossName = Literal[
    "ppo_clip",
    "gspo",
    "cispo",
    "dr_grpo",
    "dppo_tv",
    "dppo_kl",
    "gmpo",
    "luspo",
    "sapo",
    "vespo",
    "dro",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLossSpec:
    """What a policy loss reads and bounds."""

    trust_region: bool
    """As `miles.algorithms.PolicyLoss.trust_region`."""
    eps_clip: float | None = 0.2
    """Default of eps_clip; None where the loss does not read it."""
    eps_clip_high: float | None = None
    """Default of eps_clip_high when eps_clip is not given either; None: eps_clip."""
    eps_clip_below: float = 1.0
    """What eps_clip has to be less than, so that it bounds anything."""
    dual_clip: bool = False
    """Whether the loss reads eps_clip_c."""
    per_token: bool = True
    """Whether calculate_per_token_loss gives the loss that its name promises."""
    penalises: bool = False
    """Whether a sample without advantage has a gradient too."""
    settings: tuple[str, ...] = ()
    """Settings that this loss alone reads."""


POLICY_LOSS_SPECS: Mapping[str, PolicyLossSpec] = types.MappingProxyType(
    {
        "ppo_clip": PolicyLossSpec(trust_region=True, dual_clip=True),
        "gspo": PolicyLossSpec(trust_region=True, dual_clip=True),
        "cispo": PolicyLossSpec(trust_region=False, eps_clip_below=math.inf),
        "dr_grpo": PolicyLossSpec(trust_region=True, dual_clip=True, per_token=False),
        "dppo_tv": PolicyLossSpec(trust_region=True, eps_clip=0.15),
        "dppo_kl": PolicyLossSpec(trust_region=True, eps_clip=0.05, eps_clip_below=math.inf),
        "gmpo": PolicyLossSpec(trust_region=True, eps_clip=0.4, eps_clip_below=math.inf),
        "luspo": PolicyLossSpec(
            trust_region=True, eps_clip=2e-3, eps_clip_high=2.5e-3, dual_clip=True, per_token=False
        ),
        "sapo": PolicyLossSpec(trust_region=True, eps_clip=None, settings=("sapo_tau_pos", "sapo_tau_neg")),
        "vespo": PolicyLossSpec(
            trust_region=True,
            eps_clip=None,
            settings=("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        ),
        "dro": PolicyLossSpec(trust_region=True, eps_clip=None, penalises=True, settings=("dro_beta",)),
    }
)
"""Every policy loss, by its name in policy_loss_type."""

LOSS_OF_ESTIMATOR: Mapping[str, PolicyLossName] = types.MappingProxyType(
    {"gspo": "gspo", "cispo": "cispo", "dr_grpo": "dr_grpo"}
)
"""Advantage estimators whose name is that of a policy loss; others leave the choice, which is ppo_clip by default."""

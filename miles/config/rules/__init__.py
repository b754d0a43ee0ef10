"""Rules that relate several settings, each a small function in `RULES`; one file per subject.

They look at settings alone; `checks` looks at the machine. Start at `registry`.
"""

from miles.config.rules import (
    access,
    algorithm,
    architecture,
    asynchrony,
    data,
    debug,
    distillation,
    effects,
    engine,
    extensions,
    lora,
    megatron,
    moe,
    nodes,
    paths,
    policy_loss,
    precision,
    sampling,
    services,
    sizes,
    statements,
    train,
)
from miles.config.rules.registry import RULES, Rule, check

__all__ = [
    "RULES",
    "Rule",
    "access",
    "algorithm",
    "architecture",
    "asynchrony",
    "check",
    "data",
    "debug",
    "distillation",
    "effects",
    "engine",
    "extensions",
    "lora",
    "megatron",
    "moe",
    "nodes",
    "paths",
    "policy_loss",
    "precision",
    "sampling",
    "services",
    "sizes",
    "statements",
    "train",
]

"""Rules that relate several settings, each a small function in `RULES`; one file per subject.

They look at settings alone; `checks` looks at the machine. Start at `registry`.
"""

from miles.config.rules import (
    access,
    algorithm,
    asynchrony,
    data,
    effects,
    engine,
    extensions,
    lora,
    megatron,
    nodes,
    paths,
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
    "asynchrony",
    "check",
    "data",
    "effects",
    "engine",
    "extensions",
    "lora",
    "megatron",
    "nodes",
    "paths",
    "sampling",
    "services",
    "sizes",
    "statements",
    "train",
]

"""Rules that cross fields, each a small function registered in `RULES`; one file per kind of question."""

from miles.config.rules import access, algorithm, asynchrony, data, engine, lora, megatron, services, train
from miles.config.rules.registry import RULES, Rule, check

__all__ = [
    "RULES",
    "Rule",
    "access",
    "algorithm",
    "asynchrony",
    "check",
    "data",
    "engine",
    "lora",
    "megatron",
    "services",
    "train",
]

"""Rules that cross fields, each a small function registered in `RULES`; one file per kind of question."""

from miles.config.rules import algorithm, data, services, train
from miles.config.rules.registry import RULES, Rule, check

__all__ = ["RULES", "Rule", "algorithm", "check", "data", "services", "train"]

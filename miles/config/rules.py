"""Rules that cross fields, each a small function in `RULES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from miles.config.faults import Fault
from miles.config.settings import Settings, UnusableSetting

Rule = Callable[[Settings], Iterator[Fault]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a rule."""
    RULES.append(function)
    return function


def check(settings: Settings) -> list[Fault]:
    """Every fault that every rule finds. A rule stops silently at a setting that is itself at fault."""
    faults: list[Fault] = []
    for each in RULES:
        try:
            for fault in each(settings):
                faults.append(fault)  # one by one, so that faults found before a rule stops are kept
        except UnusableSetting:
            continue
    return faults

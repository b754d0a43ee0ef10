"""The list of rules and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings, UnusableSetting

Rule = Callable[[FlatSettings], Iterator[Fault]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a rule: a generator of the faults it finds. It reads settings by key and touches nothing else."""
    RULES.append(function)
    return function


def check(settings: FlatSettings) -> list[Fault]:
    """Every fault that every registered rule finds."""
    return run_rules(RULES, settings)


def run_rules(rules: Iterable[Rule], settings: FlatSettings) -> list[Fault]:
    """Every fault that these rules find. A rule ends at a setting that is itself at fault, which is reported anyway."""
    faults: list[Fault] = []
    for each in rules:
        try:
            for fault in each(settings):
                faults.append(fault)  # one by one: what a rule found before it ended counts
        except UnusableSetting:
            continue
    return faults


def needs(s: FlatSettings, key: str, switch: str) -> Iterator[Fault]:
    """The fault of a setting that does nothing because a switch is off."""
    if getattr(s, key) != catalog()[key].default and not getattr(s, switch):
        yield Fault(key, getattr(s, key), f"it does nothing without {switch}", f"turn {switch} on, or leave {key} out")

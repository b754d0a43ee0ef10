"""The registry of rules, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings, InvalidSetting

Rule = Callable[[FlatSettings], Iterator[Fault]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a rule: a generator of the faults that it finds, which reads settings and nothing else."""
    RULES.append(function)
    return function


def check(settings: FlatSettings) -> list[Fault]:
    """Return the faults that all registered rules find."""
    return run_rules(RULES, settings)


def run_rules(rules: Iterable[Rule], settings: FlatSettings) -> list[Fault]:
    """Return the faults that these rules find. A rule ends at an invalid setting, which is reported anyway."""
    faults: list[Fault] = []
    for each in rules:
        try:
            for fault in each(settings):
                faults.append(fault)  # one by one: what a rule found before it ended counts
        except InvalidSetting:
            continue
    return faults


def needs(s: FlatSettings, key: str, switch: str) -> Iterator[Fault]:
    """Yield a fault when a setting has no effect because a switch is off."""
    if getattr(s, key) != catalog()[key].default and not getattr(s, switch):
        yield Fault(key, getattr(s, key), f"it does nothing without {switch}", f"turn {switch} on, or leave {key} out")

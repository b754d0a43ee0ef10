"""Sorts the keys of a flat object by the section that they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from miles.config.notes.registry import Note
from miles.config.schema.catalog import SECTIONS, catalog, passthroughs
from miles.config.schema.faults import Fault, unknown_name
from miles.config.schema.section import says_nothing
from miles.config.sglang.taking import take
from miles.engine_spec import ENGINE_SPECS
from miles.upstream import table as upstream
from miles.upstream.table import UpstreamFlag


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """The keys of a flat object by section, without those that are no settings."""

    by_section: dict[str, dict[str, Any]]
    faults: list[Fault]
    notes: list[Note]


def distribute(flat: Mapping[str, Any]) -> Distribution:
    """Sort the keys of a flat object. Keys whose value is None count as not given."""
    known, prefixes = catalog(), passthroughs()
    found = Distribution({name: {} for name in SECTIONS}, [], [])
    passed: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key in known:
            section = known[key].section
            if not says_nothing(SECTIONS[section].model_fields[key], value):
                found.by_section[section][key] = value
            continue
        if (row := upstream.find(key)) is not None:
            if value is not None:
                _take_upstream(found, row, key, value)
            continue
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix) and key != prefix), None)
        if prefix is None:
            found.faults.append(unknown_name(key, "null" if value is None else value, known, "setting"))
        elif value is not None:
            passed.setdefault(prefix, {})[key.removeprefix(prefix)] = value
    for prefix, flags in passed.items():
        _pass_through(found, prefix, flags)
    return found


def _take_upstream(found: Distribution, row: UpstreamFlag, key: str, value: Any) -> None:
    """Refuse a flag of miles or slime that is no setting here, or note that it has no effect."""
    if row.taken == "refused":
        found.faults.append(Fault(key, value, row.reason, row.remedy))
    else:
        found.notes.append(Note(key, value, f"it changes nothing: {row.reason}"))


def _pass_through(found: Distribution, prefix: str, flags: Mapping[str, Any]) -> None:
    """Put an engine's own flags into the field that collects them, and those that are settings of ours into those."""
    section, field = passthroughs()[prefix]
    backend = found.by_section["rollout"].get("rollout_backend")
    if any(spec.name == backend and not spec.runs_servers for spec in ENGINE_SPECS.values()):
        found.by_section[section][field] = dict(flags)  # a rule refuses them all
        return
    given = {key: value for keys in found.by_section.values() for key, value in keys.items()}
    taken = take(flags, given, prefix)
    if taken.args:
        found.by_section[section][field] = taken.args
    if taken.settings:
        taken.settings.setdefault("rollout_backend", "sglang")
    for key, value in taken.settings.items():
        found.by_section[catalog()[key].section].setdefault(key, value)
    found.faults.extend(taken.faults)
    found.notes.extend(taken.notes)

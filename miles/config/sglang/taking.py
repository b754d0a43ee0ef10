"""Takes SGLang's flags into a configuration: to its servers, as settings of ours, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from miles.config.notes.registry import Note
from miles.config.schema.faults import Fault, show
from miles.config.schema.hints import nearest
from miles.config.sglang import tables
from miles.config.sglang.server_flags import ServerFlag, find, server_flags
from miles.config.sglang.values import fault_of


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """What became of flags of SGLang."""

    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Flags that servers get, under SGLang's first name of each."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of ours that follow from flags."""
    faults: list[Fault] = dataclasses.field(default_factory=list)
    notes: list[Note] = dataclasses.field(default_factory=list)


def take(flags: Mapping[str, Any], given: Mapping[str, Any], prefix: str) -> Taken:
    """Check flags of SGLang, by their names without the prefix of settings, beside the other `given` settings."""
    taken, spelt = Taken(), dict[str, str]()
    for name, value in flags.items():
        key, plain = prefix + name, name.replace("-", "_")
        if plain in tables.WITHOUT_EFFECT:
            taken.notes.append(Note(key, value, tables.WITHOUT_EFFECT[plain]))
            continue
        current = tables.RENAMED.get(plain, plain)
        flag = find(current)
        if (why := _why_refused(flag.key if flag else current)) is not None:
            taken.faults.append(Fault(key, value, *why))
        elif flag is None:
            taken.faults.append(_unknown(key, current, value, prefix))
        elif (fault := fault_of(key, flag, value)) is not None:
            taken.faults.append(fault)
        elif flag.key in spelt and not _same(value, flags[spelt[flag.key]]):
            problem = f"{prefix}{spelt[flag.key]} = {show(flags[spelt[flag.key]])} is the same flag of SGLang"
            taken.faults.append(Fault(key, value, problem, "leave one of them out"))
        else:
            spelt[flag.key] = name
            if current != plain:
                taken.notes.append(Note(key, value, f"it is {prefix}{flag.key} in this version of SGLang"))
            if flag.key in tables.SETTINGS:
                _take_setting(taken, flag, value, given, key)
            else:
                taken.args[flag.key] = value
    return taken


def _take_setting(taken: Taken, flag: ServerFlag, value: Any, given: Mapping[str, Any], key: str) -> None:
    """Take a flag as the setting that it is here, unless that has another value."""
    setting = tables.SETTINGS[flag.key]
    value = tables.DTYPES.get(str(value), value) if flag.key == "dtype" else value
    if setting not in given or _same(given[setting], value):
        taken.settings[setting] = value
    elif flag.key == "context_length" and _holds(value, given[setting]):
        taken.settings[setting] = given[setting]
        text = f"it changes nothing: {setting} = {show(given[setting])} is the longest that is asked of a server"
        taken.notes.append(Note(key, value, text))
    else:
        problem = f"{setting} = {show(given[setting])} is the setting for it"
        taken.faults.append(Fault(key, value, problem, "leave one of them out, or give both the same value"))


def _why_refused(name: str) -> tuple[str, str] | None:
    prefixes = tables.REFUSED_PREFIXES.items()
    return tables.REFUSED.get(name) or next((why for start, why in prefixes if name.startswith(start)), None)


def _unknown(key: str, name: str, value: Any, prefix: str) -> Fault:
    meant = nearest(name, server_flags())
    remedy = f"did you mean {prefix}{meant}?" if meant else "`python -m sglang.launch_server --help` lists its flags"
    return Fault(key, value, "SGLang has no such flag", remedy)


def _same(one: Any, other: Any) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)


def _holds(length: Any, longest: Any) -> bool:
    try:
        return int(length) >= int(longest)
    except (TypeError, ValueError):
        return False

"""Sorts the flags of an upstream command line: what is taken here, what is not, and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from miles.config.command.flags import OWN_FLAGS, parse_command_line
from miles.config.job import examine, resolved
from miles.config.notes import notes
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault, unknown_name
from miles.config.schema.precision_variables import asked_by
from miles.config.sglang.taking import take
from miles.migrate.environment import Environment, sort_environment
from miles.migrate.equivalents import equivalent, staleness
from miles.migrate.launch import Launch
from miles.migrate.open_values import is_open
from miles.upstream import table as upstream

_SGLANG = "--sglang-"


@dataclasses.dataclass(slots=True)
class Translation:
    """A launch script's flags as they are here."""

    launch: Launch
    flags: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Flags of the command for here with their values, some of them open."""
    not_taken: list[Fault] = dataclasses.field(default_factory=list)
    """Flags that ask for what is not done."""
    left_out: list[str] = dataclasses.field(default_factory=list)
    """Flags that change nothing, with the reason."""
    notes: list[str] = dataclasses.field(default_factory=list)
    faults: list[Fault] = dataclasses.field(default_factory=list)
    """What the settings are refused for, together."""
    flat: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The settings as a file has them."""
    environment: Environment = dataclasses.field(default_factory=Environment)


def translate(launch: Launch) -> Translation:
    """Translate what a script launches."""
    result = Translation(launch)
    given = _grouped(launch, result)
    for flag, values in given.items():
        _sort(result, flag, values)
    _follow_asynchrony(result, given)
    _take_environment(result)
    _examine(result)
    return result


def _grouped(launch: Launch, result: Translation) -> dict[str, list[str]]:
    """Return the values of each flag; of one that is given twice the last ones count, as upstream."""
    grouped: dict[str, list[str]] = {}
    flag = ""
    for word in launch.words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            grouped.pop(flag, None)
            grouped[flag] = [value] if equals else []
        elif is_open(word) and len(word) == 1 and (not flag or _is_complete(flag, grouped[flag])):
            result.notes.append(f"{launch.open.plain(word)} may have flags of its own: add them")
        elif flag:
            grouped[flag].append(word)
    return grouped


def _is_complete(flag: str, values: Sequence[str]) -> bool:
    """Whether a flag with these values needs no other."""
    entry = next((entry for entry in catalog().values() if entry.flag == flag), None)
    row = upstream.find(flag)
    if entry is not None:
        return entry.kind is bool or (entry.kind is not tuple and bool(values))
    return row is not None and (row.is_switch or bool(values))


def _sort(result: Translation, flag: str, values: list[str]) -> None:
    """Keep one flag, or say why it is not."""
    shown = " ".join([flag, *(result.launch.open.plain(value) for value in values)])
    if flag == "--fully-async":
        return
    if (others := equivalent(flag, values, result.launch.find)) is not None:
        result.notes.append(
            f"{shown[:200]} is {' '.join(' '.join([name, *words]) for name, words in others) or 'the default'}"
        )
        result.flags |= dict(others)
        return
    entry = next((entry for entry in catalog().values() if flag in (entry.flag, f"--no-{entry.flag[2:]}")), None)
    row = upstream.find(flag)
    if upstream.is_architecture(flag):
        _leave_out_architecture(result)
    elif entry is not None and row is None:
        states = entry.states
        if states is not None and flag == entry.flag and (values or [str(states.value)])[0] == str(states.value):
            result.left_out.append(f"{shown}: {states.because}")
        else:
            result.flags[flag] = values
    elif row is not None and row.taken == "refused":
        result.not_taken.append(Fault(flag, result.launch.open.plain(" ".join(values)) or True, row.reason, row.remedy))
    elif row is not None:
        result.left_out.append(f"{shown}: {row.reason}")
    elif flag.startswith(_SGLANG):
        _take_sglang(result, flag, values)
    elif flag in OWN_FLAGS:
        result.notes.append(f"{shown}: write what is in it as settings")
    else:
        known = [each.flag for each in catalog().values()]
        result.not_taken.append(unknown_name(flag, result.launch.open.plain(" ".join(values)) or True, known, "flag"))


def _leave_out_architecture(result: Translation) -> None:
    text = "flags of the model's architecture: its config.json has them"
    if text not in result.left_out:
        result.left_out.append(text)


def _take_sglang(result: Translation, flag: str, values: list[str]) -> None:
    name = flag.removeprefix(_SGLANG)
    if any(is_open(value) for value in values):
        result.flags[flag] = values
        return
    taken = take({name: values[0] if len(values) == 1 else values or True}, {}, "sglang_")
    result.not_taken += [dataclasses.replace(fault, field=flag) for fault in taken.faults]
    if not taken.faults and not taken.args and not taken.settings:
        result.left_out += [f"{flag}: {note.text}" for note in taken.notes]
        return
    result.notes += [f"{flag}: {note.text}" for note in taken.notes]
    for key in taken.args:
        result.flags[_SGLANG + key.replace("_", "-")] = values
    for key, value in taken.settings.items():
        setting = catalog()[key].flag
        if result.flags.get(setting, [str(value)]) != [str(value)]:
            problem = f"{setting} {' '.join(result.flags[setting])} is the setting for it"
            result.not_taken.append(Fault(flag, value, problem, "leave one of them out"))
        else:
            result.flags[setting] = [str(value)]
            result.notes.append(f"{flag} is {setting}")


def _follow_asynchrony(result: Translation, given: Mapping[str, Sequence[str]]) -> None:
    asked = staleness(result.launch.program, given)
    if asked is not None and "--max-weight-staleness" not in result.flags:
        bound, why = asked
        result.flags["--max-weight-staleness"] = [str(bound)]
        result.notes.append(f"--max-weight-staleness {bound}: {why}")


def _take_environment(result: Translation) -> None:
    closed = {name: value for name, value in result.launch.environment.items() if not is_open(value)}
    asked = [each for each in asked_by(closed, fp8="--fp8-format" in result.flags) if each.value is not False]
    for each in asked:
        flag = catalog()[each.key].flag
        result.flags.setdefault(flag, [] if each.value is True else [str(each.value)])
        result.notes.append(f"{each.variable} in the environment is {' '.join([flag, *result.flags[flag]])}")
    result.environment = sort_environment(result.launch.environment, [each.key for each in asked])
    variables = result.environment.trainer
    if not variables:
        return
    before = result.flags.get("--train-env-vars", ["{}"])[0]
    try:
        result.flags["--train-env-vars"] = [json.dumps(variables | json.loads(before))]
    except (ValueError, TypeError):
        result.notes.append(f"add to --train-env-vars: {json.dumps(variables)}")


def _examine(result: Translation) -> None:
    """Check the settings together, but for those that are open."""
    closed = [
        word
        for flag, values in result.flags.items()
        if not any(is_open(value) for value in values)
        for word in ([f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values])
    ]
    line = parse_command_line(closed)
    opened = {
        flag[2:].replace("-", "_"): [result.launch.open.plain(value) for value in values]
        for flag, values in result.flags.items()
        if any(is_open(value) for value in values)
    }
    examination = examine(resolved(line.flat, "cuda"), refused=[key for key in opened if key in catalog()])
    faults = line.merge(examination.faults)
    result.faults = [fault for fault in faults if fault.field not in opened]
    result.notes += [str(note) for note in (*examination.notes, *notes(examination.settings))]
    for key, value in line.flat.items():
        valid = key in catalog() and examination.settings.is_valid(key)
        result.flat[key] = getattr(examination.settings, key) if valid else value
    result.flat |= {key: values[0] if len(values) == 1 else values for key, values in opened.items()}

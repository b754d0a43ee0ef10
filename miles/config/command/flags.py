"""The command line: flags generated from the models, and `--config` files with the same keys."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from miles.config.command.yaml_files import read_file
from miles.config.job import JobConfig, examine
from miles.config.schema.catalog import Entry, catalog, passthroughs
from miles.config.schema.faults import ConfigError, Fault, unknown_name
from miles.config.schema.hints import nearest
from miles.config.sglang.server_flags import find
from miles.placement.nodes import Cluster, parse_cluster
from miles.upstream import table as upstream

OWN_FLAGS: Mapping[str, str] = {
    "--config": "FILE",
    "--dry-run": "",
    "--assume-gpus": "N,N,...",
    "--help": "",
}
"""Flags that are not settings, with the placeholders of their values."""


@dataclasses.dataclass(slots=True)
class CommandLine:
    """A parsed command line that is not checked yet."""

    flat: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings by key; flags override files."""
    dry_run: bool = False
    assumed: Cluster | None = None
    """GPUs that --assume-gpus says there are."""
    help: bool = False
    faults: list[Fault] = dataclasses.field(default_factory=list)

    def config(self) -> JobConfig:
        """Check everything and build the configuration. Raises ConfigError with the faults of flags, files, values."""
        faults = self.merge(examine(self.flat).faults)
        if faults:
            raise ConfigError(faults)
        return JobConfig.from_flat(self.flat)

    def merge(self, faults: Sequence[Fault]) -> list[Fault]:
        """Return the faults of flags and files, and then `faults` without those of misread flags."""
        misread = {fault.field for fault in self.faults}
        return [*self.faults, *(fault for fault in faults if fault.field not in misread)]


def parse_command_line(argv: Sequence[str], *, starts_nothing: bool = False) -> CommandLine:
    """Read flags and the files that `--config` names; a flag wins over a file, and what comes later over the earlier.

    Faults are collected, not raised, so that `CommandLine.config` can list them with those of the values.
    `starts_nothing` allows GPUs that are assumed, as a dry run does.
    """
    line = CommandLine()
    settings: dict[str, Any] = {}
    for flag, values in _scan(["--help" if word == "-h" else word for word in argv]):
        if not flag:
            dashed = [word for word in values if word.startswith("-")]  # what follows them is their value
            line.faults += [_stray_word(word) for word in dashed or values]
        elif flag in OWN_FLAGS:
            _take_own_flag(line, flag, values)
        elif flag in _known_flags():
            _take_setting(settings, line.faults, flag, values)
        elif flag in _unsetting_flags():
            _unset(settings, line.faults, flag, values)
        elif (key := flag[2:].replace("-", "_")).startswith(tuple(passthroughs())) or upstream.find(key):
            settings[key] = values[0] if len(values) == 1 else list(values) or True
        elif (key := key.removeprefix("no_")).startswith(tuple(passthroughs())):
            switch = find(key.removeprefix("sglang_"))
            settings[key] = False if switch is not None and switch.is_switch else None
        else:
            line.faults.append(unknown_name(flag, " ".join(values) or True, [*_known_flags(), *OWN_FLAGS], "flag"))
    line.flat |= settings
    _read_custom_config(line)
    if line.assumed is not None and not (line.dry_run or starts_nothing):
        problem = "a run needs GPUs that are there"
        line.faults.append(Fault("--assume-gpus", str(line.assumed), problem, "add --dry-run, or leave it out"))
    if line.assumed is not None and line.flat.get("device") == "cpu":
        line.faults.append(Fault("device", "cpu", "--assume-gpus says which GPUs there are", "leave one of them out"))
    return line


def _read_custom_config(line: CommandLine) -> None:
    """Take the settings of custom_config_path, which win over flags, and its other keys as custom_settings."""
    path = line.flat.pop("custom_config_path", None)
    if path is None:
        return
    content, faults = read_file(str(path), "custom_config_path")
    line.faults += faults
    prefixes = tuple(passthroughs())
    known = {key: value for key, value in content.items() if key in catalog() or key.startswith(prefixes)}
    others = {key: value for key, value in content.items() if key not in known}
    line.flat |= known
    if others:
        given = line.flat.get("custom_settings") or {}
        line.flat["custom_settings"] = {**(json.loads(given) if isinstance(given, str) else given), **others}


def to_command_line(flat: Mapping[str, Any]) -> list[str]:
    """Return the command line of a flat object, without settings at their defaults."""
    return [word for key, entry in catalog().items() for word in _words(entry, flat.get(key))]


def _words(entry: Entry, value: Any) -> list[str]:
    if value is None or value == entry.default:
        return []
    if entry.kind is bool:
        return [entry.flag if value != entry.negated else opposite(entry.flag)]
    if entry.kind is tuple:
        return [f"{entry.flag}={item}" for item in value]
    if entry.kind is dict:
        return [f"{entry.flag}={json.dumps(value)}"]
    return [f"{entry.flag}={value}"]


def opposite(flag: str) -> str:
    """Return the flag that turns a switch off, e.g. one that a file turned on."""
    return "--no-" + flag.removeprefix("--")


@functools.cache
def _known_flags() -> Mapping[str, tuple[Entry, bool]]:
    """Return the entry of each flag and, for switches, the value that it sets."""
    flags = {}
    for entry in catalog().values():
        flags[entry.flag] = (entry, not entry.negated)
        if entry.kind is bool:
            flags[opposite(entry.flag)] = (entry, entry.negated)
    return flags


@functools.cache
def _unsetting_flags() -> Mapping[str, Entry]:
    """Return the entry that each flag `--no-…` of a setting with a value leaves out."""
    return {opposite(entry.flag): entry for entry in catalog().values() if entry.kind is not bool}


def _unset(settings: dict[str, Any], faults: list[Fault], flag: str, values: Sequence[str]) -> None:
    entry = _unsetting_flags()[flag]
    if values:
        remedy = f"write {flag} alone, or {entry.flag} {entry.metavar}"
        faults.append(Fault(entry.key, " ".join(values), f"{flag} takes no value", remedy))
    settings[entry.key] = None


def _stray_word(word: str) -> Fault:
    """Return the fault of a word without a flag in front of it, which may be a flag with one dash."""
    if not word.startswith("-"):
        return Fault(word, "", "it belongs to no flag", "put its flag in front of it")
    meant = nearest(word, _known_flags())
    remedy = f"did you mean {meant}?" if meant else "write flags with two dashes"
    return Fault(word, "", "it is no flag", remedy)


def _scan(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with the words up to the next flag; words before the first have an empty flag.

    `--flag=value` takes that value alone, which may begin with dashes.
    """
    flag, open_ended = "", True
    values: list[str] = []
    for word in argv:
        if word.startswith("--"):
            if flag or values:
                yield flag, values
            flag, equals, value = word.partition("=")
            values, open_ended = ([value], False) if equals else ([], True)
        elif open_ended:
            values.append(word)
        else:
            yield flag, values
            flag, values, open_ended = "", [word], True
    if flag or values:
        yield flag, values


def _take_own_flag(line: CommandLine, flag: str, values: Sequence[str]) -> None:
    if OWN_FLAGS[flag] and len(values) != 1:
        line.faults.append(Fault(flag, " ".join(values), f"it takes one {OWN_FLAGS[flag]}", "give one"))
    elif values and not OWN_FLAGS[flag]:
        line.faults.append(Fault(flag, " ".join(values), "it is a switch", "leave its value out"))
    elif flag == "--config":
        content, faults = read_file(values[0])
        line.flat |= content
        line.faults += faults
    elif flag == "--dry-run":
        line.dry_run = True
    elif flag == "--assume-gpus":
        try:
            line.assumed = parse_cluster(values[0])
        except ValueError as error:
            line.faults.append(Fault(flag, values[0], str(error), "give the GPUs of each node"))
    else:
        line.help = True


def _take_setting(settings: dict[str, Any], faults: list[Fault], flag: str, values: list[str]) -> None:
    entry, switched = _known_flags()[flag]
    if entry.kind is bool:
        if values:
            remedy = f"write {flag} alone, or {opposite(entry.flag) if flag == entry.flag else entry.flag}"
            faults.append(Fault(entry.key, " ".join(values), f"{flag} is a switch", remedy))
        settings[entry.key] = switched
    elif not values:
        faults.append(Fault(entry.key, "", f"{flag} takes a value", f"write {flag} {entry.metavar}"))
    elif entry.kind is tuple:
        settings[entry.key] = [*(settings.get(entry.key) or []), *values]
    elif len(values) > 1:
        faults.append(Fault(entry.key, " ".join(values), f"{flag} takes one value", "quote it, or give one"))
    else:
        settings[entry.key] = values[0]

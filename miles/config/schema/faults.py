"""Faults of a configuration, which are reported all at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from miles.config.schema.hints import nearest
from miles.config.schema.other_names import setting_of
from miles.telemetry.redaction import redact_config


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One fault: the field, its value, the problem, and the remedy."""

    field: str
    value: Any
    problem: str
    remedy: str

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.field} is not set, and {self.problem}; {self.remedy}"
        return f"{self.field} = {show(self.shown_value)}, but {self.problem}; {self.remedy}"

    @property
    def shown_value(self) -> Any:
        """The value without the secrets in it."""
        return redact_config({self.field: self.value})[self.field]

    def to_json(self) -> dict[str, Any]:
        """Return the fault as a JSON object without secrets, for the REST API: `message` is the whole sentence.

        `problem` is shown beside the setting's name, so it says too when the setting has no value.
        """
        problem = f"it is not set, and {self.problem}" if self.value is None else self.problem
        return {**dataclasses.asdict(self), "value": self.shown_value, "problem": problem, "message": str(self)}


class RunFault(Fault):
    """The fault of something that a run needs, and the plan of a run does not."""


class ConfigError(ValueError):
    """A configuration was refused; `faults` lists all of its faults."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  {fault}" for fault in self.faults)]))


_SHOWN_CHARS = 300


def show(value: Any) -> str:
    """Format a value as a person would write it in YAML, on one line; the middle of a long one is left out."""
    plain = isinstance(value, str) and value and value.isprintable()
    text = str(value) if plain else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS // 2]} … {text[-_SHOWN_CHARS // 2 :]}"


def misspelt(problem: str, remedy: str) -> PydanticCustomError:
    """Return the error for a validator to raise that becomes a fault with this problem and remedy."""
    return PydanticCustomError("miles", "{problem}", {"problem": problem, "remedy": remedy})


def unknown_name(name: str, value: Any, known: Iterable[str], what: str) -> Fault:
    """Return the fault of an unknown key or flag, with the known one that was meant, by its meaning or its spelling."""
    if isinstance(value, dict) and value:
        grouped = f"there is no such {what}, and settings are in no groups"
        return Fault(name or show(name), value, grouped, "write its keys by themselves")
    names = {each.lstrip("-").replace("-", "_"): each for each in known}
    meant = setting_of(name) or ""
    dashed = f"--{meant.replace('_', '-')}" if name.startswith("--") else meant
    passed_through = dashed if meant.startswith("sglang_") else None
    suggestion = names.get(meant) or passed_through or nearest(name, names.values())
    remedy = f"did you mean {suggestion}?" if suggestion else "`miles config docs` lists them all"
    return Fault(name or show(name), value, f"there is no such {what}", remedy)


_PROBLEMS = {
    "int": ("it must be a whole number", "give one"),
    "float": ("it must be a number", "give one"),
    "finite": ("it must be a finite number", "give one"),
    "bool": ("it must be true or false", "give one of them"),
    "string": ("it must be text", "put it in quotes"),
    "tuple": ("it must be a list", "give a list"),
    "dict": ("it must be an object", 'give one, e.g. {"key": "value"}'),
}


def faults_of(error: ValidationError) -> list[Fault]:
    """Convert pydantic's errors to faults, field by field."""
    return [_fault_of(details) for details in error.errors(include_url=False)]


def _fault_of(details: ErrorDetails) -> Fault:
    field = str(details["loc"][0])
    value, limits = details["input"], details.get("ctx", {})
    match details["type"]:
        case "greater_than":
            return Fault(field, value, f"it must be above {limits['gt']:g}", "raise it")
        case "greater_than_equal":
            return Fault(field, value, f"it must be at least {limits['ge']:g}", "raise it")
        case "less_than":
            return Fault(field, value, f"it must be below {limits['lt']:g}", "lower it")
        case "less_than_equal":
            return Fault(field, value, f"it must be at most {limits['le']:g}", "lower it")
        case "literal_error":
            allowed = [choice.strip("'") for choice in limits["expected"].replace(" or ", ", ").split(", ")]
            if len(allowed) == 1:
                return Fault(
                    field, value, f"the only choice is {allowed[0]}", f"set it to {allowed[0]} or leave it out"
                )
            suggestion = nearest(str(value), allowed)
            remedy = f"did you mean {suggestion}?" if suggestion else "choose one of them"
            return Fault(field, value, f"it must be one of {', '.join(allowed)}", remedy)
        case "value_error":
            return Fault(field, value, str(limits["error"]), "correct it")
        case "miles":
            return Fault(field, value, limits["problem"], limits["remedy"])
        case kind:
            problem, remedy = _PROBLEMS.get(kind.split("_")[0], (details["msg"], "correct it"))
            if len(details["loc"]) > 1 and isinstance(value, str) and "," in value:
                remedy = "separate values by spaces, not commas"
            return Fault(field, value, problem, remedy)

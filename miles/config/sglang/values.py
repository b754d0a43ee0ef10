"""What a flag of SGLang may be set to."""

from __future__ import annotations

import json
import re
from typing import Any

from miles.config.schema.faults import Fault
from miles.config.schema.hints import nearest
from miles.config.sglang.server_flags import ServerFlag

_AMOUNT = re.compile(r"\d+(\.\d+)?(k|M|G|T|Ki|Mi|Gi|Ti)?")
_PATTERNS = {"int": re.compile(r"[-+]?\d[\d_]*"), "amount": _AMOUNT}


def fault_of(key: str, flag: ServerFlag, value: Any) -> Fault | None:
    """Return the fault of a value that SGLang would refuse, under the setting's `key`; None when it is right."""
    if flag.is_switch:
        if isinstance(value, bool):
            return None
        return Fault(key, _shown(value), "it is a switch", f"write --{_dashed(key)} alone, or true in a file")
    if flag.kind == "optional" and value is True:
        return None
    if isinstance(value, bool):
        return Fault(key, value, "it takes a value", f"write --{_dashed(key)} VALUE, or leave it out")
    if isinstance(value, list | tuple) and flag.kind != "list" and flag.type != "json":
        return Fault(key, _shown(value), "it takes one value", "quote it, or give one")
    values = value if isinstance(value, list | tuple) else [value]
    for each in values:
        if flag.choices and str(each) not in flag.choices:
            meant = nearest(str(each), flag.choices)
            remedy = f"did you mean {meant}?" if meant else "choose one of them"
            return Fault(key, each, f"SGLang has {', '.join(flag.choices)}", remedy)
        if (problem := _misread(flag.type, each)) is not None:
            return Fault(key, each, problem, "correct it")
    return None


def _misread(kind: str, value: Any) -> str | None:
    """Return what SGLang would say against a value of this type."""
    if isinstance(value, dict | list):
        return None if kind in ("json", "str") else "it must be a number"
    text = str(value).strip()
    if kind in _PATTERNS:
        return None if _PATTERNS[kind].fullmatch(text) else "it must be a whole number"
    try:
        if kind == "float":
            float(text)
        elif kind == "json":
            json.loads(text)
    except ValueError:
        return "it must be a number" if kind == "float" else "it is not JSON"
    return None


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _shown(value: Any) -> Any:
    return " ".join(str(each) for each in value) if isinstance(value, list | tuple) else value

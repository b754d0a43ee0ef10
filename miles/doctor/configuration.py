"""The configuration itself: its faults, and those of the files and functions that it names."""

from __future__ import annotations

from collections.abc import Sequence

from miles.config.checks.environment import environment_faults
from miles.config.schema.faults import Fault
from miles.doctor.finding import Finding, fail, ok
from miles.doctor.subject import Subject


def look(subject: Subject) -> Sequence[Fault] | None:
    """Return every fault but those of ports, which have a check of their own; None without a configuration."""
    if subject.settings is None:
        return None
    wrong = {fault.field for fault in subject.faults}
    here = [fault for fault in environment_faults(subject.settings) if fault.field not in wrong]
    return [*subject.faults, *(fault for fault in here if not fault.field.endswith("_port"))]


def judge(faults: Sequence[Fault] | None) -> list[Finding]:
    """Turn each fault into a finding."""
    if faults is None:
        return [ok("none was given; give train.py's flags or --config FILE to check one")]
    return [_finding(fault) for fault in faults] or [ok("no faults")]


def _finding(fault: Fault) -> Finding:
    return fail(str(fault).removesuffix(f"; {fault.remedy}"), fault.remedy)

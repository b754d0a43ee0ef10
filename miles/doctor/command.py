"""`miles doctor`: checks this machine and, with the flags of train.py, a configuration on it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from miles.config.command.flags import parse_command_line
from miles.config.command.reference_page import wrapped
from miles.doctor.checks import run_checks
from miles.doctor.finding import Finding, Status
from miles.doctor.subject import Subject
from miles.launcher.console import RunConsole, help_width, plain
from miles.rpc.exit_codes import ExitCode

_USAGE = (
    "usage: miles doctor [--json] [--config FILE] [FLAGS]",
    "Checks this machine: processor, GPUs, memory, folders, limits, proxies, Redis, packages. With train.py's flags or "
    "--config FILE also that configuration on it: its faults, its files and ports, and whether the job fits. Changes "
    "nothing and starts nothing; takes seconds. Each finding is ok, warn or fail, with what to change.",
    f"The exit code is 0 without a fail, else {ExitCode.MACHINE_UNSUITABLE:d}. --json prints one JSON object.",
)
_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def main(arguments: Sequence[str]) -> int:
    """Check and print; return the exit code."""
    words = [word for word in arguments if word != "--json"]
    line = parse_command_line(words)
    console = RunConsole()
    if line.help:
        console.print("\n\n".join(wrapped(paragraph, help_width()) for paragraph in _USAGE), markup=False)
        return ExitCode.OK
    found = run_checks(Subject.of(line))
    if len(words) < len(arguments):
        console.print(_as_json(found), markup=False)
    else:
        _print(found, console)
    unfit = any(finding.status is Status.FAIL for _, finding in found)
    return ExitCode.MACHINE_UNSUITABLE if unfit else ExitCode.OK


def _as_json(found: Sequence[tuple[str, Finding]]) -> str:
    findings = [
        {"check": check, "status": finding.status, "found": finding.found, "change": finding.change}
        for check, finding in found
    ]
    counts = Counter(finding.status for _, finding in found)
    return json.dumps({**{status: counts[status] for status in Status}, "findings": findings}, ensure_ascii=False)


def _print(found: Sequence[tuple[str, Finding]], console: RunConsole) -> None:
    width = max(len(check) for check, _ in found)
    for check, finding in found:
        status = f"[{_STYLES[finding.status]}]{finding.status:<4}[/]"
        console.print(f"{status}  {check:<{width}}  {plain(finding.found)}")
        if finding.change:
            console.print(f"{'':<{width + 6}}  change: {plain(finding.change)}")
    counts = Counter(finding.status for _, finding in found)
    console.print("\n" + ", ".join(f"{counts[status]} {status}" for status in Status))

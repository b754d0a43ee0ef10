"""Fixtures of whole runs, and the report of how long services took to recover from kills."""

from __future__ import annotations

import pytest
from chaos_schedules import RECOVERIES
from rich.console import Console
from whole_runs import start_run, tiny_dense

from miles.launcher.drill.drill import recovery_table

__all__ = ["start_run", "tiny_dense"]


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the measured recoveries."""
    config.stash[RECOVERIES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how long services took to recover, after all schedules."""
    schedules = config.stash[RECOVERIES]
    if not schedules:
        return
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        console.print(recovery_table([recovery for schedule in schedules for recovery in schedule]))
    terminalreporter.section(f"{len(schedules)} kill schedules")
    terminalreporter.write(captured.get())

"""A console whose reader has gone."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from miles.launcher.console import RunConsole
console = RunConsole()
console.print("first")
sys.stdin.readline()
console.print("nobody reads this")
console.print("nor this")
print("went on", file=sys.stderr)
"""


def test_a_program_goes_on_in_silence_when_nobody_reads_its_output_any_more() -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "first\n"
    program.stdout.close()
    _, errors = program.communicate("\n", timeout=60)
    assert (program.returncode, errors) == (0, "went on\n")

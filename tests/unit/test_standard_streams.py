"""Programs whose output nobody can read, or write, any more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LASTING = """
import sys
from miles.standard_streams import outlive_readers
outlive_readers()
print("first", flush=True)
sys.stdin.readline()
print("dropped", flush=True)
print("dropped too")
sys.stderr.write("went on\\n")
"""


def start(program: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_a_program_goes_on_when_its_reader_has_gone() -> None:
    program = start(LASTING, stdout=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stdout.readline() == "first\n"
    program.stdout.close()
    _, errors = program.communicate("\n", timeout=60)
    assert (program.returncode, errors) == (0, "went on\n")


def test_a_program_goes_on_when_the_disk_is_full() -> None:
    with open("/dev/full", "w") as full:
        _, errors = (program := start(LASTING, stdout=full)).communicate("\n", timeout=60)
    assert (program.returncode, errors) == (0, "went on\n")


def test_a_program_goes_on_when_its_terminal_has_gone() -> None:
    ours, theirs = os.openpty()
    program = start(LASTING, stdout=theirs)
    os.close(theirs)
    shown = b""
    while shown != b"first\r\n":
        shown += os.read(ours, 100)
    os.close(ours)
    _, errors = program.communicate("\n", timeout=60)
    assert (program.returncode, errors) == (0, "went on\n")


def test_output_that_was_closed_from_the_start_is_not_written_into_other_files() -> None:
    program = """
import os, sys, tempfile
from miles.standard_streams import outlive_readers
os.close(1)
outlive_readers()
with tempfile.TemporaryFile() as file:
    os.write(1, b"printed")
    assert file.fileno() > 2 and file.seek(0, 2) == 0
"""
    errors = (ended := start(program)).communicate(timeout=60)[1]
    assert (ended.returncode, errors) == (0, "")


@pytest.mark.parametrize("function", ["outlive_readers", "escape_unknown_characters"])
def test_characters_that_the_encoding_does_not_have_are_escaped(function: str) -> None:
    program = f"from miles import standard_streams; standard_streams.{function}(); print('Zürich ✓')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    output, errors = start(program, stdout=subprocess.PIPE, env=environment).communicate(timeout=60)
    assert (output, errors) == ("Z\\xfcrich \\u2713\n", "")


def test_a_command_whose_reader_has_gone_ends_without_a_traceback() -> None:
    command = f"{sys.executable} -m miles.cli config docs | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_command_whose_output_does_not_fit_says_so() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "miles.cli", "config", "docs"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (1, "miles: the output cannot be written: No space left on device\n")

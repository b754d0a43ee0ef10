"""What the console prints in terminals and pipes."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys

import pytest
from rich.table import Table

from miles.launcher.console import LogLines, RunConsole, help_width, plain


def printed(width: int | None, *objects: object) -> list[str]:
    """What a console of this width prints; None is a pipe."""
    console = RunConsole()
    if width is not None:
        console.width = width
    console.file = io.StringIO()
    console.print(*objects)
    return console.file.getvalue().splitlines()


def workers() -> Table:
    table = Table("worker", "kind", "activity", "load", "address")
    table.add_row(
        "rollout-0-very-long-name", "rollout", "generates 64 groups", "requests 63, tokens 9000", "127.0.0.1:40000"
    )
    table.add_row("trainer-0", "trainer", "", "step 4", "127.0.0.1:40001")
    return table


def test_nothing_is_broken_in_a_pipe() -> None:
    assert printed(None, "word " * 100) == ["word " * 100]
    assert [line for line in printed(None, workers()) if "rollout-0" in line and "127.0.0.1:40000" in line]


@pytest.mark.parametrize("width", [40, 80])
def test_a_table_that_does_not_fit_becomes_blocks_of_lines(width: int) -> None:
    assert printed(width, workers()) == [
        "worker    rollout-0-very-long-name",
        "kind      rollout",
        "activity  generates 64 groups",
        "load      requests 63, tokens 9000",
        "address   127.0.0.1:40000",
        "",
        "worker    trainer-0",
        "kind      trainer",
        "load      step 4",
        "address   127.0.0.1:40001",
        "",
    ]


def test_a_table_that_fits_keeps_its_rows() -> None:
    lines = printed(300, workers())
    assert len(lines) == 6
    assert max(map(len, lines)) < 140


def test_the_widest_column_alone_is_squeezed_where_that_is_enough() -> None:
    table = Table("job", "error")
    table.add_row("job-1", "word " * 30)
    lines = printed(60, table)
    assert max(map(len, lines)) == 60
    assert sum("job-1" in line for line in lines) == 1


def test_wide_characters_count_as_two_columns() -> None:
    table = Table("name", "n")
    table.add_row("模型" * 12, "1")
    assert len(printed(56, table)) == 5
    assert len(printed(40, table)) > 5


def test_text_from_elsewhere_is_neither_markup_nor_control_codes() -> None:
    assert printed(80, plain("[red]a[/] \x1b[31mb\r")) == ["[red]a[/] \\x1b[31mb\\r"]


def test_log_records_are_lines_of_their_own() -> None:
    console = RunConsole()
    console.file = io.StringIO()
    handler = LogLines(console)
    handler.handle(logging.LogRecord("a", logging.WARNING, "f.py", 1, "lost [%s] " + "x" * 200, ("w-1",), None))
    (line,) = console.file.getvalue().splitlines()
    assert line.endswith("WARNING lost [w-1] " + "x" * 200)


def test_help_is_broken_once_at_the_terminals_width_and_never_in_a_pipe() -> None:
    command = [sys.executable, "-m", "miles.cli", "config", "show", "--help"]
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any("Number of rollouts, which is the number of training steps; 0 only evaluates." in line for line in piped)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stdin=theirs, env={**os.environ, "COLUMNS": "60"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the terminal has no writer any more
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0
    texts = [line for line in shown.decode().splitlines() if line.startswith("      ")]
    assert max(map(len, texts)) == 60
    assert len([line for line in texts if len(line) < 15]) < len(texts) / 5  # not one short line after each long one


def test_a_locale_of_few_letters_costs_letters_and_not_the_command() -> None:
    command = [sys.executable, "-m", "miles.cli", "config", "show", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    said = subprocess.run(command, capture_output=True, env=environment, check=True).stdout.decode("latin-1")
    assert "--rollout-batch-size INT" in said
    assert "turns a switch off" in said


def test_text_keeps_what_looks_like_markup_or_an_emoji() -> None:
    console = RunConsole()
    console.file = io.StringIO()
    console.print("a:tram:b [red]", markup=False)
    assert console.file.getvalue() == "a:tram:b [red]\n"


def test_without_a_terminal_help_has_no_width() -> None:
    assert help_width() is None

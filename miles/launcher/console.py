"""The console of every command: what it prints can be read in a narrow terminal, and searched in a pipe."""

from __future__ import annotations

import argparse
import io
import logging
import shutil
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

_ENDLESS = 100_000
"""Columns of a file or pipe, where no line is ever broken."""
_NARROWEST = 24
"""Columns below which a table's widest column is not squeezed; the rows become blocks of lines instead."""
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class RunConsole(Console):
    """Never breaks a line of text itself, and prints a table that does not fit as one block of lines for each row.

    Falls silent when nobody reads the output any more, where rich would end the program: Ctrl-C in a terminal also ends
    the program that output is piped to (`train.py | tee log`), and the run still has to be saved and stopped.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(highlight=False, emoji=False, soft_wrap=True, stderr=stderr)
        stream = sys.stderr if stderr else sys.stdout
        if isinstance(stream, io.TextIOWrapper) and not self.encoding.startswith("utf"):
            stream.reconfigure(errors="replace")  # a locale of few letters costs letters, not the command
        if not self.is_terminal:
            self.width = _ENDLESS

    def print(self, *objects: Any, **options: Any) -> None:
        """Print text or a table; see rich's `Console.print` for the options."""
        for each in objects:
            if isinstance(each, Table):
                self._print_table(each)
            else:
                super().print(each, **options)
        if not objects:
            super().print(**options)

    def on_broken_pipe(self) -> None:
        """Tell the program that nobody reads any more; launchers, which go on, never come here."""
        raise BrokenPipeError

    def _print_table(self, table: Table) -> None:
        natural = Measurement.get(self, self.options.update(width=_ENDLESS, max_width=_ENDLESS), table).maximum
        if natural <= self.width:
            super().print(table, soft_wrap=False)
            return
        widths = [max(map(self._columns_of, (column.header, *column.cells))) for column in table.columns]
        widest = widths.index(max(widths))
        if self.width - (natural - widths[widest]) >= _NARROWEST:
            for number, column in enumerate(table.columns):
                column.no_wrap = number != widest
                column.overflow = "fold"
            super().print(table, soft_wrap=False)
            return
        headers = [str(column.header) for column in table.columns]
        name_width = max(map(len, headers))
        for row in zip(*(column.cells for column in table.columns), strict=True):
            for header, cell in zip(headers, row, strict=True):
                if cell:
                    super().print(f"[bold]{header:<{name_width}}[/]  {cell}")
            if table.show_header:
                super().print()

    def _columns_of(self, cell: Any) -> int:
        return Measurement.get(self, self.options.update(width=_ENDLESS, max_width=_ENDLESS), cell).maximum


class LogLines(logging.Handler):
    """Prints log records through a console, one line each, with time and level."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self._console.print(self.format(record), style=_STYLES.get(record.levelno), markup=False, soft_wrap=True)


def plain(text: str) -> str:
    """Return text from elsewhere as markup that prints it as it is; control characters are written out."""
    return escape("".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text))


def help_width() -> int | None:
    """Return the columns that help may have; None without a limit, where standard output is no terminal."""
    return min(100, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


class HelpFormatter(argparse.HelpFormatter):
    """Breaks lines of `--help` at the terminal's width, and nowhere in a pipe."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=help_width() or _ENDLESS)

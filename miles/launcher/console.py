"""The console of a program that outlives its readers."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class RunConsole(Console):
    """Falls silent when nobody reads the output any more, where rich would end the program.

    Ctrl-C in a terminal also ends the program that output is piped to (`train.py | tee log`), and the run still has to
    be saved and stopped.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Write nothing more; what is written past the console goes nowhere."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

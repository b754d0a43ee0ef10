"""The folder that a command is to write."""

from __future__ import annotations

import argparse
import pathlib


def check_new(parser: argparse.ArgumentParser, out: pathlib.Path) -> None:
    """End the program with an error when something is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} exists already; give a folder that is empty or does not exist yet")

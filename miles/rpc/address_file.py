"""The file into which a service writes the address that it listens on, for whoever started it."""

from __future__ import annotations

import os
import pathlib
import re

from miles.regular_files import open_to_read
from miles.rpc.exit_codes import ExitCode, ServiceExit

_ADDRESS = re.compile(rb"\S{0,300}\n?")


def write_address(path: pathlib.Path, address: str) -> None:
    """Write an address file atomically. Raises ServiceExit when something else than an address is there."""
    try:
        with open_to_read(path) as file:
            is_address = _ADDRESS.fullmatch(file.read(400)) is not None
    except FileNotFoundError:
        is_address = True
    except OSError:
        is_address = False
    if not is_address:
        problem = f"--address-file {path}: another file is there, which no service wrote"
        raise ServiceExit(ExitCode.BAD_CONFIG, f"{problem}; give another name, or remove it")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(address)
    partial.replace(path)

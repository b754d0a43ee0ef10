"""Loads functions of users by their dotted paths."""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

ALIASES = str(pathlib.Path(__file__).with_name("aliases"))
"""Folder with a package `slime`, whose modules have this system's names."""


class ExtensionError(ValueError):
    """A function of the user's that cannot be loaded, or returned what cannot be used."""


class ExtensionFailed(RuntimeError):
    """A function of the user's raised an error, or took too long; another attempt may succeed."""


def load_function(path: str) -> Callable[..., Any]:
    """Import `package.module.name` from the working folder or the Python path.

    Functions that were written for slime find the names that they import from it here: the folder of aliases is
    searched first, since a `Sample` of another system would not be ours. Raises ExtensionError.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ExtensionError(f"{path!r} is not a dotted path; write it as package.module.function")
    for folder in (os.getcwd(), ALIASES):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a module of the user's may raise anything
        raise ExtensionError(f"{path} cannot be loaded: {type(error).__name__}: {error}{remedy_of(error)}") from error
    if not callable(found):
        raise ExtensionError(f"{path} is a {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function


def remedy_of(error: BaseException) -> str:
    """Return what to do about an import of a module that is not here, as a half-sentence; or nothing."""
    name = error.name or "" if isinstance(error, ImportError) else ""
    if name.partition(".")[0] in ("slime", "miles"):
        return "; docs/extensions.md lists the modules that functions can import"
    return ""


def described(error: BaseException) -> str:
    """Return an error of a user's function in one line, with the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:1000]}{where}"

"""The `miles` command: a word for each thing to do, each in a module that is imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

COMMANDS: Mapping[str, tuple[str, str]] = {
    "config": ("miles.config.command", "the reference page of all settings, and what a command line comes to"),
}
"""Module and help text by command. A module has `main(arguments) -> exit code`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names with the rest; return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        from miles import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        print(f"miles: there is no command {words[0]}\n\n{_usage()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[words[0]]
    return int(importlib.import_module(module).main(words[1:]))


def _usage() -> str:
    lines = ["usage: miles COMMAND ...", ""]
    lines += [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "`miles COMMAND --help` says more."])


if __name__ == "__main__":
    sys.exit(main())

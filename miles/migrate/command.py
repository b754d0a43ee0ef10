"""`miles migrate SCRIPT`: writes the command for here from a launch script of miles or slime."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence

from miles.config.command.yaml_files import write_text
from miles.launcher.console import HelpFormatter
from miles.migrate.launch import Launch
from miles.migrate.translation import Translation, translate

_NOTHING_FOUND, _UNREADABLE = 1, 2


def main(arguments: Sequence[str]) -> int:
    """Run `miles migrate …`; return its exit code: 1 when the script starts no training, 2 when it cannot be read."""
    parser = argparse.ArgumentParser(
        prog="miles migrate",
        description="Read a launch script of miles or slime (bash or Python), without running it, and print the "
        "command for here. What became of the rest of its flags is printed to stderr.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("script", type=pathlib.Path, metavar="SCRIPT", help="a .sh or .py file")
    parser.add_argument("--yaml", action="store_true", help="print a file for --config instead of a command")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="value of a variable or argument of the script"
    )
    known = parser.parse_args(arguments)
    given = dict(_pair(text, parser) for text in known.set)
    try:
        launch = _read(known.script, given)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        print(f"{known.script} cannot be read: {error}", file=sys.stderr)
        return _UNREADABLE
    if not launch.program:
        print(f"{known.script} starts no train.py or train_async.py that could be found", file=sys.stderr)
        _print_all("Not followed:", map(str, launch.remarks))
        return _NOTHING_FOUND
    result = translate(launch)
    print(_as_yaml(result) if known.yaml else _as_command(result), end="")
    sys.stdout.flush()
    _report(result)
    return 0


def _pair(text: str, parser: argparse.ArgumentParser) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        parser.error(f"--set {text}: write NAME=VALUE")
    return name, value


def _read(path: pathlib.Path, given: dict[str, str]) -> Launch:
    """Read a script by the language that its name says, or else its first line."""
    if path.suffix == ".py" or (
        path.suffix != ".sh" and "python" in path.read_text(encoding="utf-8").partition("\n")[0]
    ):
        from miles.migrate.python_script import read_python_script

        return read_python_script(path, given)
    try:
        from miles.migrate.shell_script import read_shell_script
    except ImportError as error:
        raise OSError("scripts of a shell need miles[migrate] (tree-sitter and its grammar of bash)") from error
    return read_shell_script(path, given)


def _as_command(result: Translation) -> str:
    """Return the command, one flag a line."""
    written = result.launch.open.written
    lines = [" ".join([flag, *(written(value) for value in values)]) for flag, values in result.flags.items()]
    exports = [f"export {name}={shlex.quote(value)}\n" for name, value in result.environment.exported.items()]
    return "".join(exports) + " \\\n  ".join(["python train.py", *lines]) + "\n"


def _as_yaml(result: Translation) -> str:
    return write_text({key: list(value) if isinstance(value, tuple) else value for key, value in result.flat.items()})


def _report(result: Translation) -> None:
    launch, environment = result.launch, result.environment
    taken = len(result.flags)
    print(f"\n{taken} flags, {len(result.not_taken)} not taken.", file=sys.stderr)
    _print_all("Not taken:", map(str, result.not_taken))
    _print_all("Refused until it is changed:", map(str, result.faults))
    _print_all("Open, to be set in the shell or with --set:", _open_values(result))
    _print_all("Not evaluated:", map(str, launch.remarks))
    _print_all("Left out, because it changes nothing:", result.left_out)
    _print_all("Environment variables that are not set:", (f"{k}: {why}" for k, why in environment.left_out.items()))
    _print_all("Notes:", result.notes)


def _open_values(result: Translation) -> Iterator[str]:
    seen = set()
    for values in result.flags.values():
        for each in (found for value in values for found in result.launch.open.of(value)):
            if each not in seen:
                seen.add(each)
                where = f"line {each.line}: " if each.line else ""
                yield f"{each.shell}: {where}{each.why}"


def _print_all(title: str, lines: Iterator[str] | Sequence[str]) -> None:
    found = list(dict.fromkeys(lines))
    if found:
        print("\n".join(["", title, *(f"  {line}" for line in found)]), file=sys.stderr)

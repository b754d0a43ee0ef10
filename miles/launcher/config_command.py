"""`miles config`: writes the reference pages of settings and flags, and prints the configuration of a command line."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

from miles.config.command.flags import parse_command_line
from miles.config.command.reference_page import help_text, reference_page
from miles.config.command.upstream_page import upstream_page
from miles.config.command.yaml_files import write_text
from miles.config.schema.faults import ConfigError
from miles.launcher.console import HelpFormatter, RunConsole, help_width
from miles.launcher.dry_run import checked_plan, describe_run

_PAGES: Mapping[str, Callable[[], str]] = {"settings": reference_page, "flags": upstream_page}
BAD_CONFIG = 2
"""`miles.rpc.ExitCode.BAD_CONFIG`; not imported, because that would import gRPC too."""


def main(arguments: Sequence[str]) -> int:
    """Run `miles config …`; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="miles config", description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    docs = commands.add_parser("docs", help="write a reference page")
    docs.add_argument(
        "--page", choices=_PAGES, default="settings", help="all settings (the default), or the flags of miles and slime"
    )
    docs.add_argument("--out", type=pathlib.Path, metavar="FILE", help="file to write instead of printing the page")
    docs.add_argument("--check", action="store_true", help="only check whether FILE is up to date")
    commands.add_parser("show", help="check a command line and print the resulting settings", add_help=False)
    known, rest = parser.parse_known_args(arguments)
    if known.command == "show":
        return _show(rest)
    if rest:
        docs.error(f"unrecognized arguments: {' '.join(rest)}")
    if known.check and known.out is None:
        docs.error("--check needs --out FILE to compare with")
    return _docs(known.page, known.out, check=known.check)


def _docs(name: str, out: pathlib.Path | None, *, check: bool) -> int:
    page = _PAGES[name]()
    if out is None:
        RunConsole().print(page, markup=False, end="")
    elif not check:
        if out.exists() and not (out.is_file() and out.read_bytes().startswith(page.splitlines()[0].encode())):
            print(f"{out} is something else than this page; choose another file, or remove it", file=sys.stderr)
            return 1
        out.write_text(page, encoding="utf-8")
    elif not out.is_file() or out.read_text(encoding="utf-8") != page:
        print(f"{out} is not up to date: run `miles config docs --page {name} --out {out}`", file=sys.stderr)
        return 1
    return 0


def _show(arguments: Sequence[str]) -> int:
    line = parse_command_line(arguments)
    if line.help:
        usage = "usage: miles config show [--dry-run] [FLAGS]"
        RunConsole().print(f"{usage}\n\n{help_text(help_width())}", markup=False, end="")
        return 0
    try:
        plan = checked_plan(line)
    except ConfigError as error:
        RunConsole(stderr=True).print(str(error), markup=False)
        return BAD_CONFIG
    text = describe_run(plan) if line.dry_run else write_text(plan.config.to_flat())
    RunConsole().print(text, markup=False, end="")
    return 0

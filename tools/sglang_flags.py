"""Writes miles/config/sglang/flags.tsv: every flag of the SGLang that runs this, which needs nothing of this project.

Run by the interpreter of an SGLang installation, e.g. .venv-sglang/bin/python tools/sglang_flags.py; --check compares.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator

TABLE = pathlib.Path(__file__).parent.parent / "miles" / "config" / "sglang" / "flags.tsv"
COLUMNS = ("flag", "aliases", "kind", "type", "choices")
_TYPES = {"human_readable_int": "amount", "loads": "json", "json_list_type": "json", "nullable_str": "str"}


def table() -> str:
    """Return the text of the table, one flag a line in SGLang's order.

    kind: switch (on alone), toggle (with a --no-… too), value, optional (a value or none) or list; type: int,
    float, str, json, or amount (an integer that may have a unit), of each value of a list.
    """
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    rows = (_row(action) for action in parser._actions)
    return "".join("\t".join(cells) + "\n" for cells in (COLUMNS, *rows))


def _row(action: argparse.Action) -> Iterator[str]:
    names = [name[2:] for name in action.option_strings]
    toggles = isinstance(action, argparse.BooleanOptionalAction)
    aliases = [name for name in names[1:] if not (toggles and name.startswith("no-"))]
    yield names[0]
    yield ",".join(aliases)
    if toggles or action.nargs == 0:
        yield from ("toggle" if toggles else "switch", "", "")
        return
    yield {None: "value", "?": "optional"}.get(action.nargs, "list")  # type: ignore[call-overload]
    kind = getattr(action.type, "__name__", "str")
    yield _TYPES.get(kind, kind if kind in ("int", "float", "str") else "json")
    yield ",".join(sorted(str(choice) for choice in action.choices or ()))  # some of SGLang's are sets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check whether the table is up to date")
    check, text = parser.parse_args().check, table()
    if not check:
        TABLE.write_text(text, encoding="utf-8")
    elif TABLE.read_text(encoding="utf-8") != text:
        print(f"{TABLE} is not that of the installed SGLang: run {sys.executable} {__file__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

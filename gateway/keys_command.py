"""`miles keys create|list|revoke`: manages the API keys of a gateway."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from rich.table import Table

from miles.gateway.keys import ApiKey, KeyFile, KeyFileError, Scope
from miles.launcher.console import HelpFormatter, RunConsole
from miles.rpc.exit_codes import ExitCode

KEYS_ENVIRONMENT = "MILES_KEYS_FILE"
_DAY_S = 86_400


def main(arguments: Sequence[str]) -> int:
    """Create, list or revoke keys; return the exit code."""
    flags = _parse(arguments)
    keys = KeyFile(flags.keys_file)
    try:
        if flags.command == "create":
            return _create(keys, flags)
        if flags.command == "revoke":
            revoked = keys.revoke(flags.name)
            print(json.dumps(_shown(revoked)) if flags.json else f"{revoked.name} ({revoked.key_id}) is revoked")
            return ExitCode.OK
        return _list(keys, flags)
    except KeyError:
        print(f"no key is named {flags.name!r}; `miles keys list` shows them", file=sys.stderr)
    except (KeyFileError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
    return ExitCode.BAD_CONFIG


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="miles keys", description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="create a key and print it; it is shown only once")
    create.add_argument("name", help="name of the key's owner")
    scopes = "read: read everything; submit: also submit jobs and act on one's own; admin: act on all jobs"
    create.add_argument("--scope", choices=[scope.value for scope in Scope], default=Scope.READ.value, help=scopes)
    create.add_argument("--days", type=float, help="days until the key expires; default: never")
    commands.add_parser("list", help="list all keys")
    revoke = commands.add_parser("revoke", help="revoke a key")
    revoke.add_argument("name", help="name or id of the key")
    default = os.environ.get(KEYS_ENVIRONMENT)
    for command in commands.choices.values():
        command.add_argument(
            "--keys-file",
            type=pathlib.Path,
            default=default,
            required=default is None,
            metavar="FILE",
            help=f"key file of the gateway; default: ${KEYS_ENVIRONMENT}",
        )
        command.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(arguments)
    flags.keys_file = pathlib.Path(flags.keys_file)
    return flags


def _create(keys: KeyFile, flags: argparse.Namespace) -> int:
    lifetime_s = None if flags.days is None else flags.days * _DAY_S
    key, text = keys.create(flags.name, Scope(flags.scope), lifetime_s)
    if flags.json:
        print(json.dumps({**_shown(key), "key": text}))
        return ExitCode.OK
    print(text)
    print(
        "Keep it: only its hash is stored. Use it as $MILES_API_KEY, or as Authorization: Bearer KEY.", file=sys.stderr
    )
    return ExitCode.OK


def _list(keys: KeyFile, flags: argparse.Namespace) -> int:
    found = [_shown(key) for key in keys.list()]
    if flags.json:
        print(json.dumps(found))
        return ExitCode.OK
    table = Table("id", "name", "scope", "made", "expires")
    for key in found:
        table.add_row(key["id"], key["name"], key["scope"], key["created_at"], key["expires_at"] or "never")
    RunConsole().print(table)
    return ExitCode.OK


def _shown(key: ApiKey) -> dict[str, str | None]:
    return {
        "id": key.key_id,
        "name": key.name,
        "scope": str(key.scope),
        "created_at": _moment(key.created_unix_s),
        "expires_at": None if key.expires_unix_s is None else _moment(key.expires_unix_s),
    }


def _moment(unix_s: int) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).isoformat()

"""`miles checkpoints JOB`: lists a job's checkpoints, or downloads one."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from miles.client.commands.common import Output, moment, parser, run, size_text
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient


def main(arguments: Sequence[str]) -> int:
    """List checkpoints or download one; return the exit code."""
    made = parser("checkpoints", "Checkpoints of a job.")
    made.add_argument("job", help="id of the job")
    made.add_argument(
        "--download", type=int, metavar="STEP", help="download the Hugging Face export of this step (tar)"
    )
    made.add_argument("--out", type=pathlib.Path, metavar="FILE", help="file to write; default: JOB-stepSTEP.tar")
    return run(made.parse_args(arguments), _run)


def _run(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
    if flags.download is not None:
        path = flags.out or pathlib.Path(f"{flags.job}-step{flags.download}.tar")
        if path.exists():
            output.error(f"{path} exists already; give another file with --out, or remove it")
            return ExitCode.BAD_CONFIG
        size = client.download(flags.job, flags.download, path)
        if output.as_json:
            output.json({"path": str(path), "size_bytes": size})
        else:
            output.console.print(f"{path}: {size_text(size)}", markup=False)
        return ExitCode.OK
    checkpoints = client.checkpoints(flags.job)
    if output.as_json:
        output.json(checkpoints)
        return ExitCode.OK
    table = Table("step", "saved", "training state", "Hugging Face export")
    for checkpoint in checkpoints:
        exported = sum(file["size_bytes"] for file in checkpoint["hf_files"])
        table.add_row(
            str(checkpoint["step"]),
            moment(checkpoint["saved_at"]),
            size_text(checkpoint["state_bytes"]) if checkpoint["state_bytes"] else "",
            size_text(exported) if exported else "",
        )
    output.console.print(table)
    return ExitCode.OK

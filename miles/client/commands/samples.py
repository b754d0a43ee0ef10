"""`miles samples JOB`: lists samples that a job trained on; `miles samples check PATH` checks them."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from miles.client.commands.common import Output, parser, run
from miles.launcher.console import plain
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient

_SHOWN_CHARS = 400


def main(arguments: Sequence[str]) -> int:
    """List samples, or check stored ones (`miles samples check`); return the exit code."""
    if arguments[:1] == ["check"]:
        from miles.client.commands import check_samples

        return check_samples.main(arguments[1:])
    made = parser(
        "samples",
        "List samples that a job trained on, newest step first; a few groups of each step are recorded. "
        "`miles samples check PATH` checks recorded files instead.",
    )
    made.add_argument("job", help="id of the job")
    made.add_argument("--step", type=int, help="only samples of this training step")
    made.add_argument("--min-reward", type=float, help="only samples with at least this reward")
    made.add_argument("--max-reward", type=float, help="only samples with at most this reward")
    made.add_argument("--limit", type=int, default=20, metavar="N", help="largest number of samples to list")
    return run(made.parse_args(arguments), _list)


def _list(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
    found = client.samples(
        flags.job,
        step=flags.step,
        min_reward=flags.min_reward,
        max_reward=flags.max_reward,
        page_size=min(max(flags.limit, 1), 500),
    )
    samples = list(itertools.islice(found, flags.limit))
    if output.as_json:
        output.json(samples)
        return ExitCode.OK
    table = Table("step", "group", "prompt", "response", "reward", "versions", "|Δlogp|", "advantage", show_lines=True)
    for sample in samples:
        difference = sample["log_prob_diff"]
        table.add_row(
            str(sample["step"]),
            f"{sample['group_id']}.{sample['index']}",
            plain(_short(_prompt_text(sample["prompt"]))),
            plain(_short(sample["response"])),
            "" if sample["reward"] is None else f"{sample['reward']:g}",
            " ".join(dict.fromkeys(str(span["version"]) for span in sample["versions"])),
            "" if difference is None else f"{difference['mean']:.1e}",
            "" if sample["advantage"] is None else f"{sample['advantage']:.2f}",
        )
    output.console.print(table)
    return ExitCode.OK


def _prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS // 2]} … {text[-_SHOWN_CHARS // 2 :]}"

"""`miles trace RUN_DIR`: where the time of a traced step went, as a table, and as a file that Perfetto draws.

Reads what a run with --trace-steps has written to RUN_DIR/traces. A row is one kind of work of one process: how often
it was under way in the step, the longest of them, and for how long at least one was under way, in all and by phase of
the step, in milliseconds. Rows overlap: processes work at once, and work contains work.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from miles.launcher.console import HelpFormatter
from miles.rpc.exit_codes import ExitCode
from miles.telemetry.trace_budget import Row, budget, phase_lengths
from miles.telemetry.trace_events import trace_events
from miles.telemetry.trace_files import Trace, read_trace, traced_steps


def main(arguments: Sequence[str]) -> int:
    """Print the table; return the exit code."""
    made = argparse.ArgumentParser(
        prog="miles trace", description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    made.add_argument("run_dir", type=pathlib.Path, metavar="RUN_DIR")
    made.add_argument("--step", type=int, help="the step; default: the last one that was traced")
    made.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write Chrome trace events (JSON) here as well")
    made.add_argument("--least-ms", type=float, default=0.1, metavar="MS", help="leave out rows below this; 0.1")
    flags = made.parse_args(arguments)
    steps = traced_steps(flags.run_dir)
    if not steps or flags.step not in (None, *steps):
        wanted = "a step" if flags.step is None else f"step {flags.step}"
        has = f"it has traces of steps {', '.join(map(str, steps))}" if steps else "set --trace-steps to write some"
        print(f"{flags.run_dir} has no trace of {wanted}; {has}", file=sys.stderr)
        return ExitCode.BAD_CONFIG
    try:
        trace = read_trace(flags.run_dir, steps[-1] if flags.step is None else flags.step)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_CONFIG
    print(table(trace, flags.least_ms / 1e3))
    if flags.out is not None:
        flags.out.write_text(json.dumps(trace_events(trace)))
        print(f"\n{flags.out}: open it at ui.perfetto.dev or chrome://tracing")
    return ExitCode.OK


def table(trace: Trace, least_s: float) -> str:
    """The table of a trace, without rows below `least_s` seconds."""
    lengths = phase_lengths(trace)
    lines = [f"step {trace.step}: {sum(lengths.values()) * 1e3:.1f} ms", ""]
    lines.append(
        f"{'process':<14}{'work':<28}{'count':>7}{'longest':>9}{'in all':>9}" + "".join(map("{:>9}".format, lengths))
    )
    lines.append(
        f"{'step':<14}{'':<28}{'':>7}{'':>9}{_ms(sum(lengths.values()))}" + "".join(map(_ms, lengths.values()))
    )
    lines += [_line(row) for row in budget(trace) if row.total_s >= least_s]
    return "\n".join(lines)


def _line(row: Row) -> str:
    cells = [_ms(row.longest_s), _ms(row.total_s), *map(_ms, row.busy_s.values())]
    return f"{row.process:<14}{row.name:<28}{row.count:>7}" + "".join(cells)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:>9.1f}"

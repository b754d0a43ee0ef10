"""`miles watch JOB`: shows a live view of a job until it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.client.commands.common import END_CODES, Output, parser, run
from miles.launcher.run_view import RunView
from miles.rpc.exit_codes import ExitCode
from miles.rpc.gen import job_pb2

if TYPE_CHECKING:
    from miles.client import MilesClient


def main(arguments: Sequence[str]) -> int:
    """Watch a job; return the exit code, which says how it ended."""
    made = parser("watch", "Watch a job until it ends. The exit code says how: 0 succeeded, 31 failed, 32 cancelled.")
    made.add_argument("job", help="id of the job")
    made.add_argument("--after", metavar="ID", help="show only events after this one")
    return run(made.parse_args(arguments), lambda client, flags, output: follow(client, flags.job, output, flags.after))


def follow(client: MilesClient, job_id: str, output: Output, after: str | None = None) -> int:
    """Show a job's events until it ends."""
    if output.as_json:
        for event in client.watch(job_id, after=after):
            output.json(event)
    else:
        num_rollout = client.job(job_id)["num_rollout"]
        with RunView(output.console) as view:
            for event in client.watch(job_id, after=after):
                if event["type"] == "metrics" and not num_rollout:
                    num_rollout = client.job(job_id)["num_rollout"]
                view.show(to_proto(event), num_rollout)
    job = client.job(job_id)
    if job["error"] and not output.as_json:
        output.error(job["error"])
    return END_CODES.get(job["state"], ExitCode.OK)


def to_proto(event: Mapping[str, Any]) -> job_pb2.JobEvent:
    """Convert an event of the API to the message that the live view takes."""
    made = job_pb2.JobEvent(event_id=event["id"])
    match event["type"]:
        case "state":
            made.state_changed.state = job_pb2.JobState.Value(f"JOB_STATE_{event['state'].upper()}")
            made.state_changed.reason = event["reason"]
        case "metrics":
            made.metrics.step = event["step"]
            for name, value in event["values"].items():
                made.metrics.values[name] = math.nan if value is None else value
        case "log":
            made.log.level = job_pb2.LogLevel.Value(f"LOG_LEVEL_{event['level'].upper()}")
            made.log.source, made.log.text = event["source"], event["text"]
    return made

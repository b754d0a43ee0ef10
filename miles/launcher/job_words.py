"""What the launcher says of a job that exists already, and of one that has not succeeded."""

from __future__ import annotations

from miles.rpc.gen import controller_pb2, job_pb2


def resumption(submitted: controller_pb2.SubmitJobResponse) -> str | None:
    """Say what becomes of a job that this run folder had before; None for a new one."""
    job, changes = submitted.job, ", ".join(submitted.changes)
    if submitted.created:
        return None
    if submitted.resumed:
        start = f"job {job.job_id} exists in this run folder; resuming it from its newest checkpoint"
        return f"{start} with other settings: {changes}" if changes else start
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return f"job {job.job_id} has run to its end in this run folder"
    start = f"job {job.job_id} of this run folder was interrupted and runs on"
    if not changes:
        return start
    return (
        f"{start} with the settings it had; other ones are not applied: {changes}. Stop it (Ctrl-C "
        "saves it) and give the command again to apply them"
    )


def end_words(job: job_pb2.Job) -> str:
    """Say how a job has ended that did not succeed, and how to go on."""
    if job.state == job_pb2.JOB_STATE_CANCELLED:
        return "the job was cancelled; the same command goes on from its newest checkpoint"
    state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
    return f"the job has {state}: {job.error}"

"""Let runs load side by side and take their steps one after the other: loading takes longer than what is measured.

    python -m benchmarks.gpu.turn hold RUN_DIR       # pause its job as soon as it exists; returns when that has loaded
    python -m benchmarks.gpu.turn go RUN_DIR         # resume it; its steps begin

A paused job holds its memory on the GPU and computes nothing; an idle SGLang server polls one core.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

import grpc

from miles.rpc.channel import connect_blocking
from miles.rpc.gen import controller_pb2, controller_pb2_grpc, job_pb2

POLL_S = 0.5
LOADING = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_STARTING, job_pb2.JOB_STATE_RUNNING)


def job_of(stub: controller_pb2_grpc.ControllerServiceStub) -> job_pb2.Job | None:
    """The run's job; None before it exists."""
    jobs = stub.ListJobs(controller_pb2.ListJobsRequest(), wait_for_ready=True, timeout=30.0).jobs
    return jobs[0] if jobs else None


def hold(stub: controller_pb2_grpc.ControllerServiceStub) -> job_pb2.Job:
    """Pause the job, and wait until it has loaded what it needs, or has ended."""
    while (job := job_of(stub)) is None:
        time.sleep(POLL_S)
    stub.ControlJob(controller_pb2.ControlJobRequest(job_id=job.job_id, action=controller_pb2.JOB_ACTION_PAUSE))
    while job is not None and job.state in LOADING:
        time.sleep(POLL_S)
        job = job_of(stub)
    assert job is not None
    return job


def go(stub: controller_pb2_grpc.ControllerServiceStub) -> None:
    """Resume the job."""
    job = job_of(stub)
    assert job is not None
    stub.ControlJob(controller_pb2.ControlJobRequest(job_id=job.job_id, action=controller_pb2.JOB_ACTION_RESUME))


def stub_of(run_dir: pathlib.Path) -> controller_pb2_grpc.ControllerServiceStub:
    """The controller of a run, once it has written its address."""
    address = run_dir / "controller.address"
    while not address.exists() or not address.read_text().strip():
        time.sleep(POLL_S)
    channel: grpc.Channel = connect_blocking(address.read_text().strip())
    return controller_pb2_grpc.ControllerServiceStub(channel)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["hold", "go"])
    parser.add_argument("run_dir", type=pathlib.Path)
    args = parser.parse_args()
    stub = stub_of(args.run_dir)
    if args.action == "go":
        go(stub)
        return
    state = hold(stub).state
    print(f"{args.run_dir}: {job_pb2.JobState.Name(state)}", flush=True)
    if state != job_pb2.JOB_STATE_PAUSED:
        sys.exit(1)


if __name__ == "__main__":
    main()

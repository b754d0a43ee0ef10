from __future__ import annotations

import io

from rich.console import Console

from miles.launcher.run_view import RunView
from miles.rpc.gen import job_pb2


def step(number: int, seconds: float) -> job_pb2.JobEvent:
    metrics = job_pb2.Metrics(step=number, values={"perf/step_time": seconds, "rollout/raw_reward": 0.5})
    return job_pb2.JobEvent(metrics=metrics)


def test_the_first_step_says_how_long_the_rest_will_take() -> None:
    output = io.StringIO()
    with RunView(Console(file=output, width=200)) as view:
        for number in range(3):
            view.show(step(number, 18.0), 40)
    said = [line for line in output.getvalue().splitlines() if "on this machine" in line]
    assert said == ["a step takes about 18.0 s on this machine: about 12 minutes for the 39 that are left"]


def test_a_step_that_waited_for_an_evaluation_is_no_measure() -> None:
    output = io.StringIO()
    evaluation = job_pb2.JobEvent(metrics=job_pb2.Metrics(step=0, values={"eval/sort": 0.3}))
    with RunView(Console(file=output, width=200)) as view:
        for event in (evaluation, step(0, 55.0), step(1, 18.0), step(2, 17.0)):
            view.show(event, 40)
    said = [line for line in output.getvalue().splitlines() if "on this machine" in line]
    assert said == ["a step takes about 18.0 s on this machine: about 11 minutes for the 38 that are left"]


def test_after_the_only_step_nothing_is_forecast() -> None:
    output = io.StringIO()
    with RunView(Console(file=output, width=200)) as view:
        view.show(step(0, 1.0), 1)
    assert "on this machine" not in output.getvalue()


def test_the_progress_bar_has_its_end_as_soon_as_it_is_known() -> None:
    output = io.StringIO()
    started = job_pb2.JobEvent(state_changed=job_pb2.JobStateChanged(state=job_pb2.JOB_STATE_RUNNING, reason="a [b]"))
    with RunView(Console(file=output, width=200)) as view:
        view.show(started, 40)
    shown = output.getvalue()
    assert "running: a [b]" in shown
    assert " 0/40 " in shown


def test_a_step_shows_how_much_of_the_drafts_was_accepted_where_there_are_any() -> None:
    output = io.StringIO()
    drafted = step(1, 1.0)
    drafted.metrics.values["speculative/accept_length"] = 2.4142
    with RunView(Console(file=output, width=200)) as view:
        view.show(step(0, 1.0), 2)
        view.show(drafted, 2)
    first, second = (line for line in output.getvalue().splitlines() if line.startswith("step "))
    assert "accept" not in first
    assert "accept 2.41" in second

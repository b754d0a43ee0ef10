"""Live view of a run in a terminal, from the job's events."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from miles.launcher.console import plain
from miles.rpc.gen import job_pb2

_SHOWN = (
    ("rollout/raw_reward", "reward", "{:.3f}"),
    ("rollout/fully_async/avg_staleness", "staleness", "{:.1f}"),
    ("rollout/response_len/mean", "length", "{:.1f}"),
    ("speculative/accept_length", "accept", "{:.2f}"),
    ("train/grad_norm", "grad", "{:.2f}"),
    ("train/train_rollout_logprob_abs_diff", "|Δlogp|", "{:.1e}"),
    ("perf/tokens_per_gpu_per_sec", "tok/s", "{:.0f}"),
    ("perf/step_time", "step", "{:.1f}s"),
)


def forecast(step_s: float, steps_left: int) -> str:
    """Estimate how long the rest of a run takes if every step takes `step_s` seconds."""
    left_s = step_s * steps_left
    left = f"{left_s:.0f} s" if left_s < 120 else f"{left_s / 60:.0f} minutes"
    return f"a step takes about {step_s:.1f} s on this machine: about {left} for the {steps_left} that are left"


class RunView:
    """Prints one line per step, above a progress bar with the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("starting", total=None, left="")
        self._first: tuple[int, float] | None = None
        self._evaluated = False
        """Whether an evaluation has ended since the last step, which makes the next step longer than others."""
        self._has_forecast = False

    def __enter__(self) -> RunView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: job_pb2.JobEvent, num_rollout: int) -> None:
        """Show one event."""
        if num_rollout:
            self._progress.update(self._task, total=num_rollout)
        kind = event.WhichOneof("kind")
        if kind == "metrics":
            self._show_metrics(event.metrics, num_rollout)
        elif kind == "state_changed":
            state = job_pb2.JobState.Name(event.state_changed.state).removeprefix("JOB_STATE_").lower()
            self._progress.update(self._task, description=state)
            self._console.print(f"[bold]{state}[/bold]: {plain(event.state_changed.reason)}", highlight=False)
        elif kind == "log":
            style = {job_pb2.LOG_LEVEL_WARNING: "yellow", job_pb2.LOG_LEVEL_ERROR: "red"}.get(event.log.level, "dim")
            self._console.print(event.log.text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _show_metrics(self, metrics: job_pb2.Metrics, num_rollout: int) -> None:
        values = metrics.values
        if evaluated := {name: value for name, value in values.items() if name.startswith("eval/")}:
            means = ", ".join(
                f"{name} {value:.3f}" for name, value in sorted(evaluated.items()) if name.count("/") == 1
            )
            self._console.print(f"[cyan]evaluation: {means}[/cyan]", highlight=False)
            self._evaluated = True
        if "perf/step_time" not in values:
            return
        done = metrics.step + 1
        cells = [f"{label} {form.format(values[name])}" for name, label, form in _SHOWN if name in values]
        self._console.print(f"step {done:>4}/{num_rollout}  " + "  ".join(cells), highlight=False, soft_wrap=True)
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        if not self._has_forecast and not self._evaluated and done < num_rollout:
            self._has_forecast = True
            text = forecast(values["perf/step_time"], num_rollout - done)
            self._console.print(text, style="dim", highlight=False, soft_wrap=True)
        self._evaluated = False
        left = ""
        if done > self._first[0]:
            seconds = (now - self._first[1]) / (done - self._first[0]) * (num_rollout - done)
            left = f"left {int(seconds) // 60}:{int(seconds) % 60:02d}"
        self._progress.update(self._task, completed=done, left=left)

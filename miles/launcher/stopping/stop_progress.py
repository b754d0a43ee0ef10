"""What to print while a run is being stopped, and when to stop waiting: pure rules, without I/O or a clock."""

from __future__ import annotations

import dataclasses

REPEAT_S = 10.0
"""How often to repeat what the run waits for."""
_NOTHING_TRAINED = frozenset({"queued", "starting", "gathering", "loading", "recovering", "ending", "ended"})
"""Phases in which the trainer has no unsaved steps."""
_SAVING = "saving"
_LEAVING = "the trainer to leave the step between two micro-batches"
"""What the run waits for in a training step when it is asked to stop."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunSnapshot:
    """The state of a run as the controller describes it."""

    phase: str
    waiting_for: str
    for_s: float
    """How long the phase has lasted, in seconds."""
    step: int
    """Training steps taken."""
    saved_step: int | None
    """Training steps that the newest checkpoint covers; None when there is none."""
    save_limit_s: float
    """How long a checkpoint may take to be written."""

    @property
    def lost(self) -> bool:
        """Whether steps would be lost if the run ended now."""
        return self.step > (self.saved_step or 0)


class StopProgress:
    """Gets the state of a run at short intervals, and returns what to print and whether the time limit has passed."""

    def __init__(self, limit_s: float, now_s: float) -> None:
        """`limit_s` bounds everything but the writing of the checkpoint, whose limit the controller knows."""
        self._limit_s = limit_s
        self._updated_s = self._printed_s = now_s
        self._spent_s = {False: 0.0, True: 0.0}
        """By whether the checkpoint was being written."""
        self._saving = False
        self._run: RunSnapshot | None = None
        self._answered = True
        self._printed = ""
        """What the run waited for when something was printed last."""

    def update(self, now_s: float, run: RunSnapshot | None) -> str:
        """Return what to print now, if anything; `run` is None when the controller does not answer."""
        self._spent_s[self._saving] += now_s - self._updated_s
        self._updated_s = now_s
        self._answered = run is not None
        self._saving = run is not None and run.phase == _SAVING
        self._run = run or self._run
        first, before, subject = not self._printed, self._printed, self._subject
        if not first and subject == before and now_s - self._printed_s < REPEAT_S:
            return ""
        self._printed, self._printed_s = subject, now_s
        if first:
            return f"stopping: {self._wait_from_now()}{self._then()}. {self._second_interrupt()}"
        return f"still stopping: {self._wait_from_now()}"

    @property
    def timed_out(self) -> bool:
        """Whether the limit of what the run waits for has passed."""
        return self._left_s <= 0

    @property
    def loses_steps(self) -> bool:
        """Whether ending the run now loses steps, as far as is known."""
        return self._run is None or self._run.lost

    def timeout_message(self) -> str:
        """Return what to print when the limit has passed."""
        waited_s = self._spent_s[self._saving]
        end = "the run ends without saving" if self.loses_steps else "the run ends"
        return f"gave up after {waited_s:.0f} s of waiting for {self._what()}: {end}. {self.resume_hint()}"

    def resume_hint(self) -> str:
        """Return where the same command resumes."""
        run = self._run
        if run is None:
            return "The same command goes on from the newest checkpoint"
        if not run.saved_step:
            start = "The same command starts from the beginning"
        else:
            start = f"The same command goes on from step {run.saved_step}"
        return f"{start}; {_loss(run)}" if run.lost else start

    @property
    def _limit_now_s(self) -> float:
        if self._saving and self._run is not None:
            return max(self._run.save_limit_s, self._limit_s)
        return self._limit_s

    @property
    def _left_s(self) -> float:
        return self._limit_now_s - self._spent_s[self._saving]

    @property
    def _subject(self) -> str:
        """What the run waits for, without how long."""
        if self._run is None or not self._answered:
            return "the controller"
        return f"{self._run.phase} {self._run.step} {self._run.waiting_for or _LEAVING}"

    def _wait_from_now(self) -> str:
        return f"waiting for {self._what()}, at most {max(0.0, self._left_s):.0f} s"

    def _what(self) -> str:
        run = self._run
        if run is None:
            return "the controller, which does not answer"
        if not self._answered:
            return f"the controller, which does not answer; it was {_activity(run)}"
        since = f"{run.for_s:.0f} s"
        match run.phase:
            case "training":
                return f"training step {run.step + 1}, which began {since} ago ({run.waiting_for or _LEAVING})"
            case "saving":
                return f"the checkpoint of step {run.step}, whose writing began {since} ago"
            case "collecting" | "paused":
                return f"the run to stop {_activity(run)}"
            case _:
                return f"{run.waiting_for or 'the run to go on'} ({run.phase} for {since})"

    def _then(self) -> str:
        """What follows what the run waits for now."""
        run = self._run
        if run is None or run.phase in _NOTHING_TRAINED or run.phase == _SAVING:
            return ""
        queued = " (its samples stay in the queue)" if run.phase == "training" else ""
        if run.saved_step == run.step:
            return f"{queued}; step {run.step} is saved"
        written = f"then the checkpoint of step {run.step} is written, at most {run.save_limit_s:.0f} s"
        return f"{queued}; {written}"

    def _second_interrupt(self) -> str:
        at_once = "Ctrl-C again stops at once"
        if self._run is None:
            return f"{at_once} without saving"
        if self._run.lost:
            return f"{at_once} without saving: {_loss(self._run)}"
        return f"{at_once}: no finished step is lost"


def _activity(run: RunSnapshot) -> str:
    step = run.step + 1
    return {
        "training": f"training step {step}",
        "collecting": f"collecting samples for step {step}",
        "paused": f"being paused before step {step}",
    }.get(run.phase, run.phase)


def _loss(run: RunSnapshot) -> str:
    if not run.saved_step:
        return f"all {run.step} steps are lost" if run.step > 1 else "the one step taken is lost"
    return f"steps after {run.saved_step} are lost"

"""What to say while a run is being stopped, and when to give it up: rules without I/O and without a clock."""

from __future__ import annotations

import dataclasses

REPEAT_S = 10.0
"""How often to say again what is waited for."""
_NOTHING_TRAINED = frozenset({"queued", "starting", "loading", "recovering", "ending", "ended"})
"""Phases in which the trainer holds nothing that could still be saved."""
_SAVING = "saving"
_LEAVING = "the trainer to leave the step between two micro-batches"
"""What the run waits for in a training step once it is asked to stop."""


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """A run as the controller describes it."""

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


class Stopping:
    """Told at short intervals how a run stands, says what a person should read, and when to wait no longer."""

    def __init__(self, limit_s: float, now_s: float) -> None:
        """`limit_s` bounds everything but the writing of the checkpoint, whose limit the controller knows."""
        self._limit_s = limit_s
        self._looked_s = self._said_s = now_s
        self._spent_s = {False: 0.0, True: 0.0}
        """By whether the checkpoint was being written."""
        self._saving = False
        self._moment: Moment | None = None
        self._answered = True
        self._said = ""
        """What was waited for when something was said last."""

    def look(self, now_s: float, moment: Moment | None) -> str:
        """What to print now, if anything; `moment` is None when the controller does not answer."""
        self._spent_s[self._saving] += now_s - self._looked_s
        self._looked_s = now_s
        self._answered = moment is not None
        self._saving = moment is not None and moment.phase == _SAVING
        self._moment = moment or self._moment
        first, before, subject = not self._said, self._said, self._subject
        if not first and subject == before and now_s - self._said_s < REPEAT_S:
            return ""
        self._said, self._said_s = subject, now_s
        if first:
            return f"stopping: {self._wait_from_now()}{self._then()}. {self._second_time()}"
        return f"still stopping: {self._wait_from_now()}"

    @property
    def gives_up(self) -> bool:
        """Whether the limit of what is waited for has passed."""
        return self._left_s <= 0

    @property
    def loses_steps(self) -> bool:
        """Whether steps are lost, as far as is known, when the run ends as it is."""
        return self._moment is None or self._moment.lost

    def last_words(self) -> str:
        """What to print when the limit has passed."""
        waited_s = self._spent_s[self._saving]
        end = "the run ends without saving" if self.loses_steps else "the run ends"
        return f"gave up after {waited_s:.0f} s of waiting for {self._what()}: {end}. {self.resume()}"

    def resume(self) -> str:
        """From where the same command goes on."""
        moment = self._moment
        if moment is None:
            return "The same command goes on from the newest checkpoint"
        if not moment.saved_step:
            start = "The same command starts from the beginning"
        else:
            start = f"The same command goes on from step {moment.saved_step}"
        return f"{start}; {_loss(moment)}" if moment.lost else start

    @property
    def _limit_now_s(self) -> float:
        if self._saving and self._moment is not None:
            return max(self._moment.save_limit_s, self._limit_s)
        return self._limit_s

    @property
    def _left_s(self) -> float:
        return self._limit_now_s - self._spent_s[self._saving]

    @property
    def _subject(self) -> str:
        """What is waited for, without how long."""
        if self._moment is None or not self._answered:
            return "the controller"
        return f"{self._moment.phase} {self._moment.step} {self._moment.waiting_for or _LEAVING}"

    def _wait_from_now(self) -> str:
        return f"waiting for {self._what()}, at most {max(0.0, self._left_s):.0f} s"

    def _what(self) -> str:
        moment = self._moment
        if moment is None:
            return "the controller, which does not answer"
        if not self._answered:
            return f"the controller, which does not answer; it was {_doing(moment)}"
        since = f"{moment.for_s:.0f} s"
        match moment.phase:
            case "training":
                return f"training step {moment.step + 1}, which began {since} ago ({moment.waiting_for or _LEAVING})"
            case "saving":
                return f"the checkpoint of step {moment.step}, whose writing began {since} ago"
            case "collecting" | "paused":
                return f"the run to stop {_doing(moment)}"
            case _:
                return f"{moment.waiting_for or 'the run to go on'} ({moment.phase} for {since})"

    def _then(self) -> str:
        """What comes after what is waited for now."""
        moment = self._moment
        if moment is None or moment.phase in _NOTHING_TRAINED or moment.phase == _SAVING:
            return ""
        queued = " (its samples stay in the queue)" if moment.phase == "training" else ""
        if moment.saved_step == moment.step:
            return f"{queued}; step {moment.step} is saved"
        written = f"then the checkpoint of step {moment.step} is written, at most {moment.save_limit_s:.0f} s"
        return f"{queued}; {written}"

    def _second_time(self) -> str:
        at_once = "Ctrl-C again stops at once"
        if self._moment is None:
            return f"{at_once} without saving"
        if self._moment.lost:
            return f"{at_once} without saving: {_loss(self._moment)}"
        return f"{at_once}: no finished step is lost"


def _doing(moment: Moment) -> str:
    step = moment.step + 1
    return {
        "training": f"training step {step}",
        "collecting": f"collecting samples for step {step}",
        "paused": f"being paused before step {step}",
    }.get(moment.phase, moment.phase)


def _loss(moment: Moment) -> str:
    if not moment.saved_step:
        return f"all {moment.step} steps are lost" if moment.step > 1 else "the one step taken is lost"
    return f"steps after {moment.saved_step} are lost"

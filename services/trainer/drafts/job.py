"""The job that the draft trainer holds: a thread that follows the recordings, trains, and publishes what it learned."""

from __future__ import annotations

import collections
import dataclasses
import gc
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import torch

from miles.config import JobConfig
from miles.drafts import recordings
from miles.drafts.folders import trained_dir
from miles.services.trainer.drafts.control import Control, StoppedError
from miles.services.trainer.drafts.progress import DraftProgress
from miles.services.trainer.drafts.publication import DraftPublisher
from miles.services.trainer.drafts.training import DraftTraining
from miles.telemetry.repeated_warnings import RepeatedWarnings
from miles.telemetry.tracing import span

if TYPE_CHECKING:
    from miles.services.trainer.drafts.protocol import Learner

logger = logging.getLogger(__name__)

_POLL_S = 0.2
"""How often the folder of recordings is looked at."""
_RETRY_S = 2.0
"""Time between two attempts to reach the weight-sync service."""
_WARNINGS_KEPT = 100


class DraftJob:
    """One job's draft model. `begin` starts its thread; everything public may be called by any other thread."""

    def __init__(
        self,
        job_id: str,
        config: JobConfig,
        run_dir: pathlib.Path,
        weightsync_address: str,
        learner: Learner,
        device: torch.device,
        policy_step: int | None,
        on_change: Callable[[], None],
    ) -> None:
        """Go on from the job's checkpoint, if there is one; `on_change` is called whenever `progress` is another.

        Without `policy_step` nothing is trained or published until `reload` says it.

        Raises UnusableDraftCheckpointError.
        """
        self.job_id = job_id
        self.progress = DraftProgress()
        self.failure: str | None = None
        """Why the thread has ended by itself; set once the device's memory is free."""
        self.warnings: collections.deque[tuple[int, str]] = collections.deque(maxlen=_WARNINGS_KEPT)
        """The newest, each with its number."""
        self._run_dir = run_dir
        self._root = recordings.root_of(config, run_dir)
        self._on_change = on_change
        self._training = DraftTraining(config, run_dir, learner, device)
        self._publisher = DraftPublisher(config, job_id, weightsync_address, device)
        self._control = Control(self._training.release_memory, self._training.restore_memory)
        self._repeated = RepeatedWarnings()
        self._asked = threading.Lock()
        self._may_train = False
        """Whether the policy's step was ever said."""
        self._policy_step: int | None = policy_step
        """Set when the run was loaded again, until the thread has taken note of it."""
        self._published: int | None = None
        """Newest version that the service has; None before the first, and when it is to be published again."""
        self._publication_due = False
        self._unsaved = ""
        """Why what was learned last could not be saved."""
        self._thread = threading.Thread(target=self._run, name=f"draft of job {job_id}", daemon=True)

    def begin(self) -> None:
        """Start training."""
        self._thread.start()

    def reload(self, policy_step: int) -> None:
        """The run was loaded again, with so many steps taken by the policy: publish again what is there."""
        with self._asked:
            self._policy_step, self._published = policy_step, None
            self.progress = dataclasses.replace(self.progress, version=None, recorded_step=None)
        self._control.wake()

    def hold(self, *, release_memory: bool) -> int:
        """Return once nothing computes, with the bytes of device memory that are free meanwhile."""
        return self._control.hold(release_memory=release_memory)

    def go_on(self) -> None:
        """Go on after a hold."""
        self._control.go_on()

    def close(self, deadline_s: float) -> None:
        """End the thread, which saves what it has learned since its last version.

        Raises TimeoutError, and RuntimeError when it could not be saved.
        """
        self._control.stop()
        if self._thread.is_alive():
            self._thread.join(deadline_s)
            if self._thread.is_alive():
                raise TimeoutError(f"waited {deadline_s:g} s for the draft trainer to end a step of job {self.job_id}")
        if self._unsaved:
            raise RuntimeError(self._unsaved)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failure = None
        try:
            while True:
                self._note(self._idle_activity())
                self._control.between_steps()
                self._take_reload()
                if not self._may_train:
                    self._control.sleep(_POLL_S)
                elif self._publication_due:
                    self._publish()
                elif (step := self._training.cursor.next(recordings.steps(self._root))) is not None:
                    self._train_on(step)
                else:
                    self._control.sleep(_POLL_S)
        except StoppedError:
            self._save_at_end()
        except Exception as error:
            logger.exception("training of the draft model of job %s has ended", self.job_id)
            failure = f"{type(error).__name__}: {error}"
        finally:
            self._publisher.close()
            self._free_memory()
            self.failure = failure
            self._control.end()
            self._on_change()

    def _save_at_end(self) -> None:
        try:
            self._training.save_at_end(trained_dir(self._run_dir))
        except Exception as error:
            logger.exception("what the draft model of job %s has learned last is lost", self.job_id)
            self._unsaved = f"what the draft model has learned last is lost: {type(error).__name__}: {error}"

    def _free_memory(self) -> None:
        gc.collect()
        try:
            self._training.release_memory()
        except Exception:  # of a device that is broken
            logger.exception("the memory of the draft model of job %s could not be freed", self.job_id)

    def _take_reload(self) -> None:
        with self._asked:
            step, self._policy_step = self._policy_step, None
        if step is not None:
            self._may_train = True
            self._training.policy_is_at(step)
            self._publication_due = self._training.version > 0

    def _idle_activity(self) -> str:
        if self._control.is_asked_to_hold:
            return "held"
        return "waiting for recordings" if self._may_train else "waiting for the run to be loaded"

    def _train_on(self, step: int) -> None:
        training = self._training
        if missed := training.cursor.reach(step):
            when = f"before the draft trainer came to read {_them(missed)}, or never made"
            self._warn(f"{_steps(missed)} gone {when}; {_REMEDY}")
        self._note(f"training on step {step}")
        try:
            with span("train draft", step):
                for _ in training.learn(recordings.read(self._root, step), step):
                    self._note(f"training on step {step}")
                    if self._control.is_asked_to_hold:
                        self._note("held")
                    self._control.between_steps()
        except recordings.RecordingGone:
            training.cursor.gone(step)
            self._warn(f"{_steps(range(step, step + 1))} removed while the draft trainer read it; {_REMEDY}")
        except recordings.RecordingDamaged as error:
            training.cursor.gone(step)
            self._warn(str(error))
        else:
            if training.is_version_due:
                training.finish_version()
                self._publication_due = True

    def _publish(self) -> None:
        training = self._training
        self._note(f"publishing version {training.version}")
        began = time.monotonic()
        try:
            self._publisher.publish(training.version, training.cursor.last + 1, training.learner)
        except (grpc.RpcError, OSError) as error:
            why = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
            self._warn(f"version {training.version} of the draft could not be published and is tried again: {why}")
            self._control.sleep(_RETRY_S)
            return
        training.published(time.monotonic() - began)
        self._publication_due = False
        with self._asked:
            if self._policy_step is None:
                self._published = training.version
        self._note(f"saving version {training.version}")
        training.save_version()
        self._note("waiting for recordings")

    def _note(self, activity: str) -> None:
        training = self._training
        with self._asked:
            before = self.progress
            self.progress = DraftProgress(
                activity=activity,
                version=self._published,
                recordings=training.recordings,
                missed_recordings=training.cursor.missed,
                metrics=before.metrics if self._published in (None, before.version) else training.metrics,
                recorded_step=self._recorded_step(),
                optimizer_steps=training.optimizer_steps,
            )
        if self.progress != before:
            self._on_change()

    def _recorded_step(self) -> int | None:
        """None as well until it is the step of the policy that was loaded last."""
        last = self._training.cursor.last
        return last if last >= 0 and self._policy_step is None else None

    def _warn(self, text: str) -> None:
        if not (line := self._repeated.note(text)):
            return
        logger.warning("%s", line)
        number = self.warnings[-1][0] + 1 if self.warnings else 1
        self.warnings.append((number, line))
        self._on_change()


_REMEDY = (
    "the draft learns less than it could: raise draft_recordings_kept, lower draft_tokens_per_step or draft_passes, or "
    "give it a device of its own (draft_train_device)"
)


def _steps(steps: range) -> str:
    if len(steps) == 1:
        return f"the recording of training step {steps[0]} was"
    return f"the recordings of training steps {steps[0]} to {steps[-1]} were"


def _them(steps: range) -> str:
    return "it" if len(steps) == 1 else "them"

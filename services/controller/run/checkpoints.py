"""Has the trainer save checkpoints, and knows which step the newest one covers."""

from __future__ import annotations

from miles.checkpoint_folder import step_of
from miles.config import JobConfig
from miles.rpc.gen import trainer_pb2
from miles.services.controller.clients.protocols import Rollouts, Trainer
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.jobs.history import JobHistory
from miles.services.controller.run.report import RunReport
from miles.services.controller.status.activity import ActivityClock
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.status.worker_activity import WorkerActivities


class Checkpoints:
    """Saves checkpoints of one run."""

    def __init__(
        self,
        config: JobConfig,
        history: JobHistory,
        controls: JobControls,
        status: RunStatus,
        clock: ActivityClock,
        activities: WorkerActivities,
        report: RunReport,
        rollouts: Rollouts,
    ) -> None:
        self._config = config.checkpoint
        self._has_trainer = config.debug.has_trainer
        self._history = history
        self._controls = controls
        self._status = status
        self._clock = clock
        self._activities = activities
        self._report = report
        self._rollouts = rollouts

    def due(self, step: int, last: int) -> bool:
        """Return whether a checkpoint follows a step; the last step's is written when the job ends."""
        interval = self._config.save_interval
        return self._has_trainer and interval is not None and 0 < step < last and step % interval == 0

    def asked(self, step: int, last: int) -> bool:
        """Return whether the user has asked for a checkpoint or one is due."""
        return self._has_trainer and (self._controls.checkpoint or self.due(step, last))

    async def save_as_asked(self, trainer: Trainer) -> None:
        """Save a checkpoint as configured; the user's wish is fulfilled."""
        self._controls.checkpoint = False
        await self.save(trainer, self._config.save_hf is not None, in_background=self._config.async_save)

    async def save(self, trainer: Trainer, export_hf: bool, in_background: bool = False) -> None:
        """Save a checkpoint; one in the background is noted when the trainer names it later."""
        saving = self._status.during("saving", "the checkpoint to be written")
        with saving, self._clock.during("train"), self._activities.during(trainer.worker_id, "save"):
            saved = await trainer.save(export_hf, in_background)
        self.note(saved.checkpoint_dir)
        if saved.hf_dir:
            self._history.summary["hf_checkpoint"] = saved.hf_dir
        self._report.save_summary_later(self._status.step, self._rollouts.generated_tokens)
        what = f"the checkpoint of step {saved.step} begun" if in_background else f"saved {saved.checkpoint_dir}"
        await self._report.info(f"{what} in {saved.save_s:.1f} s")

    def note(self, folder: str) -> None:
        """Note the folder of the newest complete checkpoint; empty when there is none."""
        if folder:
            self._history.summary["checkpoint"] = folder
            self._status.saved_step = step_of(folder)

    def find_saved_step(self, ready: trainer_pb2.TrainerReady) -> None:
        """Note the steps that the newest checkpoint covers when a run is loaded.

        It may be newer than the one that was loaded: a trainer that kept the job has saved since then.
        """
        if not self._has_trainer:
            self._status.saved_step = ready.step
            return
        folders = (ready.checkpoint_dir, self._history.summary.get("checkpoint", ""))
        saved = [step for step in map(step_of, folders) if step is not None and step <= ready.step]
        self._status.saved_step = max(saved, default=None)

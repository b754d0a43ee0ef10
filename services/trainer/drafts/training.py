"""A draft model while it learns: what it has learned from, its versions, its checkpoint, and its memory."""

from __future__ import annotations

import collections
import logging
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from miles.config.speculation import speculation_of
from miles.drafts.folders import checkpoint_dir, initial_dir
from miles.services.trainer.drafts import checkpoint
from miles.services.trainer.drafts.cursor import RecordingCursor
from miles.services.trainer.drafts.host_copy import HostCopy

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.drafts.recording import RecordedSample
    from miles.services.trainer.drafts.protocol import Learner

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_OWN_HEAD = "(the run's own)"
"""Stands in a checkpoint for the head that is made when no draft model is given."""


class DraftBrokenError(ArithmeticError):
    """The draft model has weights that are no numbers; its checkpoint has not."""


class DraftTraining:
    """A learner with its place in the recordings. Called by one thread alone."""

    def __init__(self, config: JobConfig, run_dir: pathlib.Path, learner: Learner, device: torch.device) -> None:
        """Go on from the job's checkpoint, if there is one. Raises UnusableDraftCheckpointError."""
        self.learner = learner
        self.version = 0
        """Version of these weights, published or about to be; 0 is the draft that the run began with."""
        self.recordings = 0
        """Recordings trained on, a count."""
        self.optimizer_steps = 0
        """Since this process began, a count."""
        self.metrics: Mapping[str, float] = {}
        """Of the newest version."""
        self.cursor = RecordingCursor(-1)
        self._interval = config.drafts.draft_update_interval
        self._folder = checkpoint_dir(run_dir)
        self._device = device
        self._host_copy = HostCopy(device)
        speculation = speculation_of(config.rollout.sglang_args)
        draft = str(speculation.draft_model_path)
        if draft == str(initial_dir(pathlib.Path(config.services.run_dir))):
            draft = _OWN_HEAD  # not its path, as the run's folder may move
        self._origin = {"algorithm": speculation.kind.value, "draft_model": draft}
        self._unpublished = 0
        """Recordings trained on since the newest version, a count."""
        self._has_begun = False
        """Whether the first recording that is expected is known, and saved."""
        self._sums: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._counts: collections.Counter[str] = collections.Counter()
        self._train_s = 0.0
        self._save_s = 0.0
        """Of the newest checkpoint."""
        self._is_saved = False
        """Whether the checkpoint has the newest version."""
        self._resume()

    @property
    def is_version_due(self) -> bool:
        """Whether a new version is to be made of what was learned."""
        return self._unpublished >= self._interval

    def policy_is_at(self, policy_step: int) -> None:
        """The policy has taken so many steps; before the first recording, and whenever the run was loaded again.

        Raises OSError when the place cannot be saved, from which a trainer killed before the first version goes on.
        """
        if self._has_begun:
            self.cursor.rewind(policy_step)
        else:
            self.cursor.begin_at(policy_step)
            self._save()
            self._has_begun = True

    def learn(self, samples: Sequence[RecordedSample], step: int) -> Iterator[None]:
        """Train on the recording of a step, one optimizer step at each `next`."""
        began = time.monotonic()
        for metrics in self.learner.learn(samples):
            self.optimizer_steps += 1
            for name, value in metrics.items():
                self._sums[name] += value
                self._counts[name] += 1
            self._train_s += time.monotonic() - began
            yield
            began = time.monotonic()
        self._train_s += time.monotonic() - began
        self.cursor.done(step)
        self.recordings += 1
        self._unpublished += 1

    def finish_version(self) -> None:
        """Make the next version of what was learned, and note its number. Raises DraftBrokenError, and OSError."""
        self._check_finite()
        means = {_metric(name): total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        self._unpublished = 0
        self.metrics = {**means, "draft/train_s": self._train_s}
        self._train_s = 0.0
        self._begin_version(self.version + 1)

    def published(self, publish_s: float) -> None:
        """Note how long the publication of the newest version took."""
        parts = {**self.metrics, "draft/save_s": self._save_s, "draft/publish_s": publish_s}
        total = sum(parts.get(f"draft/{part}_s", 0.0) for part in ("train", "save", "publish"))
        self.metrics = {**parts, "draft/update_s": total}

    def save_version(self) -> None:
        """Write the checkpoint, if the newest version is not in it. Raises OSError."""
        if not self._is_saved:
            self._save()

    def release_memory(self) -> int:
        """Move everything to host memory; return the device memory that is freed, in bytes."""
        if self._device.type != "cuda":
            return 0
        before = torch.cuda.memory_reserved(self._device)
        self.learner.move(_CPU)
        torch.cuda.empty_cache()
        return before - torch.cuda.memory_reserved(self._device)

    def restore_memory(self) -> None:
        """Move everything back."""
        self.learner.move(self._device)

    def save_at_end(self, folder: pathlib.Path) -> None:
        """Write the checkpoint, and the model into a Hugging Face folder, if it has learned anything."""
        if self.version == 0 and not self._unpublished:
            return
        self._check_finite()
        if self._unpublished:  # a version of its own: what was published under the number is something else
            self.finish_version()
        self.save_version()
        partial = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        self.learner.save(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def _resume(self) -> None:
        if (found := checkpoint.load(self._folder)) is not None:
            self._take(*found)
        if (noted := checkpoint.noted_version(self._folder)) > self.version:
            logger.warning("version %d of the draft model was not saved: it goes on as version %d", noted, noted + 1)
            self._begin_version(noted + 1)

    def _begin_version(self, version: int) -> None:
        checkpoint.note_version(self._folder, version)
        self.version, self._is_saved = version, False

    def _take(self, record: checkpoint.DraftRecord, state: Mapping[str, torch.Tensor]) -> None:
        path = self._folder / checkpoint.FILE
        for key, value in self._origin.items():
            if (saved := getattr(record, key)) != value:
                raise checkpoint.UnusableDraftCheckpointError(
                    path, f"its {key} is {saved}, and that of the run {value}"
                )
        try:
            self.learner.load_state(state)
        except ValueError as error:
            raise checkpoint.UnusableDraftCheckpointError(path, str(error)) from error
        self.version, self.recordings, self.metrics = record.version, record.recordings, record.metrics
        self.cursor = RecordingCursor(record.recorded_step, record.missed_recordings)
        self._has_begun = self._is_saved = True
        logger.info("the draft model goes on from version %d, after step %d", self.version, self.cursor.last)

    def _save(self) -> None:
        began = time.monotonic()
        record = checkpoint.DraftRecord(
            **self._origin,
            version=self.version,
            recorded_step=self.cursor.last,
            recordings=self.recordings,
            missed_recordings=self.cursor.missed,
            metrics=self.metrics,
        )
        checkpoint.save(self._folder, record, self._host_copy.of(self.learner.state()))
        self._is_saved = True
        self._save_s = time.monotonic() - began

    def _check_finite(self) -> None:
        finite = {name: torch.isfinite(tensor).all() for name, tensor in self.learner.export()}
        values = torch.stack(list(finite.values())).tolist()  # waits for the device once
        broken = [name for name, is_finite in zip(finite, values, strict=True) if not is_finite]
        if broken:
            raise DraftBrokenError(
                f"{broken[0]} of the draft model has values that are no finite numbers after step {self.cursor.last}; "
                f"version {self.version} is gone on from: lower draft_learning_rate if this happens again"
            )


def _metric(name: str) -> str:
    return name if "/" in name else f"draft/{name}"

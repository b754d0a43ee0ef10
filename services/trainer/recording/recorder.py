"""Records samples in the first optimizer step of a rollout, on one rank, and writes them while the step goes on.

A step that is abandoned, or whose update is skipped, leaves nothing. One that cannot be written is a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from miles.algorithms.token_sets import TokenSetScores
from miles.drafts import recording_files as files
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import RolloutBatch, response_mask
from miles.services.trainer.batch.rollout_schedule import RolloutSchedule
from miles.services.trainer.checkpoint.errors import cause_of
from miles.services.trainer.recording.choice import choose, indices_of
from miles.services.trainer.recording.pieces import Piece, joined
from miles.services.trainer.recording.rows import RecordedRows, recorded_rows
from miles.threads import Threads
from miles.types import Sample

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class RecordingOptions:
    """What is recorded, and where to."""

    root: pathlib.Path
    layers: tuple[int, ...]
    """See `RecordedSample.hidden_TD`; ascending."""
    top_tokens: int
    tokens_per_step: int
    kept: int
    seed: int


@dataclasses.dataclass(slots=True)
class _Step:
    """A training step that is recorded."""

    number: int
    samples: list[Sample]
    """Those that are recorded."""
    numbers: dict[int, int]
    """Number of each among them, by its index in the rollout."""
    pieces: dict[int, tuple[MicroBatch, Piece]] = dataclasses.field(default_factory=dict)
    """By identity of the micro-batch, which is held so that no other gets the same."""
    shortest: int = 0
    """Tokens of the shortest sample that could have been; 0 without any."""
    seconds: float = 0.0
    """That the step took longer on this rank."""
    writing: Future[bool] | None = None
    """Whether there was anything to write."""
    is_skipped: bool = False
    """Whether the update was skipped."""

    @property
    def tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)


@dataclasses.dataclass(frozen=True, slots=True)
class _Outcome:
    """What a rank says at the end."""

    wrote: bool
    """Whether there is a file, or in the end a recording."""
    seconds: float = 0.0
    error: str = ""


class Recorder:
    """This rank's part. Every rank makes the same calls, of which `finish` is collective."""

    def __init__(self, options: RecordingOptions) -> None:
        self.options = options
        self.warnings: list[str] = []
        """Of the last `finish`; the same on every rank."""
        self._step: _Step | None = None
        self._is_on = False
        self._threads = Threads(1, thread_name_prefix="recordings")

    def discard_from(self, step: int) -> str:
        """Delete on rank 0 what an earlier start has recorded of steps that will be taken again; says what failed."""
        try:
            files.discard_from(self.options.root, step)
        except OSError as error:
            return f"recordings of steps that will be taken again could not be deleted: {cause_of(error)}"
        return ""

    def begin(self, number: int, batch: RolloutBatch, schedule: RolloutSchedule) -> None:
        """Choose what is recorded of a rollout."""
        options, step = self.options, schedule.steps[0]
        chosen = choose(batch.samples, step, options.tokens_per_step, (options.seed, number))
        samples = [batch.samples[index] for index in chosen]
        shortest = min((len(batch.samples[index].tokens) for index in indices_of(step)), default=0)
        numbers = {index: place for place, index in enumerate(chosen)}
        self._step = _Step(number, samples, numbers, shortest=shortest)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record in the policy's forward passes meanwhile."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def rows(self, micro_batch: MicroBatch) -> RecordedRows | None:
        """What is to be recorded of a micro-batch's forward pass; None for nothing."""
        if not self._is_on or self._step is None:
            return None
        return recorded_rows(micro_batch, self._step.numbers)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of a part of the recording."""
        began = time.monotonic()
        yield
        if self._step is not None:
            self._step.seconds += time.monotonic() - began

    def keep_hidden(self, micro_batch: MicroBatch, rows_N2: torch.Tensor, layer: int, hidden_ND: torch.Tensor) -> None:
        """Keep what is behind a layer at this rank's rows of a micro-batch, which are the same for every layer."""
        self._piece(micro_batch).keep_hidden(rows_N2, layer, hidden_ND)

    def keep_top(self, micro_batch: MicroBatch, rows_M2: torch.Tensor, scores: TokenSetScores) -> None:
        """Keep the likeliest tokens at this rank's response positions."""
        self._piece(micro_batch).keep_top(rows_M2, scores)

    def forget(self, micro_batch: MicroBatch) -> None:
        """Discard what was kept of a micro-batch, whose samples will be computed again."""
        if self._step is not None:
            self._step.pieces.pop(id(micro_batch), None)

    def write(self) -> None:
        """Begin to write; call when the step can no longer be abandoned."""
        if self._step is not None and self._step.samples:
            self._step.writing = self._threads.submit(self._write, self._step, _all_that_is_queued())

    def skip(self) -> None:
        """Have `finish` leave nothing of this step, whose update was skipped; called on every rank."""
        if self._step is not None:
            self._step.is_skipped = True

    def abandon(self) -> None:
        """Forget this step, which was abandoned; nothing of it was written."""
        self._step = None

    def finish(self) -> dict[str, float]:
        """Wait until all ranks have written, and complete the recording; metrics, the same on every rank."""
        self.warnings = []
        step, self._step = self._step, None
        if step is None or step.writing is None:
            if step is not None and not step.samples and step.shortest:
                self.warnings.append(_too_small(self.options.tokens_per_step, step))
            return _metrics(0, 0.0)
        outcomes = _gathered(_outcome(step))
        error = "; ".join(f"rank {rank}: {each.error}" for rank, each in enumerate(outcomes) if each.error)
        leaves = not error and not step.is_skipped
        ending = _of_first_rank(self._end(step, outcomes, leaves=leaves) if dist.get_rank() == 0 else _Outcome(False))
        if error or (leaves and not ending.wrote):
            reason = error or ending.error
            self.warnings.append(f"step {step.number} was not recorded for the draft model: {reason}")
        elif ending.error:
            self.warnings.append(f"older recordings for the draft model could not be deleted: {ending.error}")
        for words in self.warnings:
            logger.warning("%s", words)
        seconds = max(outcome.seconds for outcome in outcomes) + ending.seconds
        return _metrics(step.tokens if ending.wrote else 0, seconds)

    def close(self) -> None:
        """Wait for what is being written."""
        self._threads.shutdown()

    def _piece(self, micro_batch: MicroBatch) -> Piece:
        assert self._step is not None, "begin() was not called"
        return self._step.pieces.setdefault(id(micro_batch), (micro_batch, Piece()))[1]

    def _write(self, step: _Step, queued: torch.cuda.Event | None) -> bool:
        if queued is not None:
            queued.synchronize()
        part = joined([piece for _, piece in step.pieces.values()])
        if part is None:
            return False
        files.write_part(files.partial_folder(self.options.root, step.number), dist.get_rank(), part)
        return True

    def _end(self, step: _Step, outcomes: Sequence[_Outcome], *, leaves: bool) -> _Outcome:
        """On rank 0 put the recording in place and delete older ones, or delete what the ranks have written."""
        began = time.monotonic()
        root, options, done = self.options.root, self.options, False
        parts = tuple(files.part_name(rank) for rank, outcome in enumerate(outcomes) if outcome.wrote)
        error = ""
        try:
            if leaves:
                facts = files.Facts(step.number, options.layers, options.top_tokens, parts)
                files.complete(root, facts, _all_samples(step.samples))
                done = True
                files.keep_newest(root, options.kept)
        except OSError as caught:
            error = cause_of(caught)
        if not done:
            with contextlib.suppress(OSError):  # what is left is deleted when a job is loaded
                files.discard(files.partial_folder(root, step.number))
        return _Outcome(done, time.monotonic() - began, error)


def _metrics(tokens: int, seconds: float) -> dict[str, float]:
    return {"draft/recorded_tokens": float(tokens), "draft/record_s": seconds}


def _too_small(budget: int, step: _Step) -> str:
    return (
        f"step {step.number} was not recorded for the draft model: its shortest sample has {step.shortest} tokens, and "
        f"draft_tokens_per_step is {budget}; raise it"
    )


def _all_samples(samples: Sequence[Sample]) -> files.Samples:
    return files.Samples(
        tokens_T=torch.from_numpy(np.concatenate([sample.tokens for sample in samples]).astype(np.int32)),
        lengths_S=torch.tensor([len(sample.tokens) for sample in samples]),
        prompt_lengths_S=torch.tensor([sample.prompt_length for sample in samples]),
        loss_mask_R=torch.from_numpy(np.concatenate([response_mask(sample) for sample in samples]).astype(np.uint8)),
    )


def _all_that_is_queued() -> torch.cuda.Event | None:
    """What happens when the GPU has done all that it was told; None without one."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    queued = torch.cuda.Event()  # type: ignore[no-untyped-call]
    queued.record()
    return queued


def _outcome(step: _Step) -> _Outcome:
    """Wait for this rank's file."""
    assert step.writing is not None, "write() was called"
    began = time.monotonic()
    try:
        wrote = step.writing.result()
    except Exception as error:  # whatever it is, the training step is not the worse for it
        return _Outcome(False, step.seconds, cause_of(error))
    return _Outcome(wrote, step.seconds + time.monotonic() - began)


def _gathered(outcome: _Outcome) -> list[_Outcome]:
    """Every rank's; collective."""
    outcomes: list[Any] = [outcome] * dist.get_world_size()
    if len(outcomes) > 1:
        dist.all_gather_object(outcomes, outcome)
    return outcomes


def _of_first_rank(outcome: _Outcome) -> _Outcome:
    """Rank 0's on all ranks; collective."""
    outcomes: list[Any] = [outcome]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcomes, src=0)
    ending: _Outcome = outcomes[0]
    return ending

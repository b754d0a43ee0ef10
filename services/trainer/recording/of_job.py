"""What a job's trainer records for its draft model, from its configuration."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from miles.config.checks.model_layout import layer_count
from miles.config.speculation import speculation_of
from miles.drafts.recorded_layers import recorded_layers
from miles.drafts.recordings import root_of
from miles.services.trainer.recording.recorder import Recorder, RecordingOptions

if TYPE_CHECKING:
    from miles.config import JobConfig


def recorder_of(config: JobConfig) -> Recorder | None:
    """This rank's recorder; None when no draft model is trained. Raises ValueError for a draft that does not fit."""
    drafts, folder = config.drafts, str(config.rollout.hf_checkpoint)
    if not drafts.enable_draft_training:
        return None
    layers = layer_count(folder)
    if layers is None:
        raise ValueError(f"config.json in {folder} does not say num_hidden_layers, which the layers for the draft need")
    options = RecordingOptions(
        root=root_of(config, pathlib.Path(config.services.run_dir)),
        layers=recorded_layers(speculation_of(config.rollout.sglang_args), layers),
        top_tokens=drafts.draft_top_tokens,
        tokens_per_step=drafts.draft_tokens_per_step,
        kept=drafts.draft_recordings_kept,
        seed=config.train.seed,
    )
    return Recorder(options)

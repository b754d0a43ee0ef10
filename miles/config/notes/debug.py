"""Notes on runs of one half: what has no effect without the other one."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.eval_sets import evaluates
from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings


@noted
def a_half_that_is_missing(s: FlatSettings) -> Iterator[Note]:
    if s.debug_rollout_only:
        text = "there is no trainer: settings of training, checkpoints and weight updates change nothing"
        yield Note("debug_rollout_only", True, text)
        if evaluates(s):
            yield Note("eval_interval", s.eval_interval, "the initial weights alone are evaluated")
    if s.debug_train_only:
        text = "there are no engines: settings of prompts, sampling, rewards and evaluation change nothing"
        key = "load_debug_rollout_data"
        yield Note(key, getattr(s, key), text)

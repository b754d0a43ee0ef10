"""Notes on built-in functions that are given by name."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings
from miles.extensions.names import DEFAULT_DATA_SOURCES, DEFAULT_ROLLOUTS, FULLY_ASYNC_ROLLOUTS, MIS_FUNCTIONS


@noted
def built_in_names(s: FlatSettings) -> Iterator[Note]:
    for key in ("rollout_function_path", "eval_function_path", "data_source_path"):
        if (value := getattr(s, key)) in DEFAULT_ROLLOUTS + DEFAULT_DATA_SOURCES:
            yield Note(key, value, "it changes nothing: that is what is done anyway")
    if (value := s.rollout_function_path) in FULLY_ASYNC_ROLLOUTS:
        how = f"generation goes on during training, at most max_weight_staleness = {s.max_weight_staleness} steps ahead"
        yield Note("rollout_function_path", value, how)
    if (value := s.custom_tis_function_path) in MIS_FUNCTIONS:
        yield Note("custom_tis_function_path", value, "use_mis computes it, with the settings of the same names")

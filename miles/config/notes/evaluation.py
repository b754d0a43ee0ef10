"""Notes on evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings


@noted
def data_sets_that_a_file_replaces(s: FlatSettings) -> Iterator[Note]:
    if s.eval_config and s.eval_prompt_data:
        text = "it changes nothing: eval_config names the data sets in its place"
        yield Note("eval_prompt_data", list(s.eval_prompt_data), text)

"""Notes on settings of on-policy distillation."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings
from miles.config.schema.teacher_functions import SCORES


@noted
def the_teacher_is_asked_anyway(s: FlatSettings) -> Iterator[Note]:
    if s.use_opd and s.opd_type == "sglang" and s.given("custom_rm_path") and s.custom_rm_path is None:
        text = "opd_type = sglang asks the teacher anyway, and rewards are 0 where rows name none"
        yield Note("custom_rm_path", SCORES[0], text)

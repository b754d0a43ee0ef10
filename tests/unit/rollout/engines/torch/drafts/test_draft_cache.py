from __future__ import annotations

import random

from miles.services.rollout.engines.torch.drafts.draft_cache import MAX_ROWS, passes
from miles.services.rollout.engines.torch.model.spans import Span


def test_passes_compute_every_row_once_in_order_and_are_bounded():
    generator = random.Random(0)
    for _ in range(200):
        lengths = [generator.choice((1, 2, 50, 900, MAX_ROWS, MAX_ROWS + 1, 3 * MAX_ROWS)) for _ in range(8)]
        starts = [generator.randrange(100) for _ in lengths]
        spans = [Span(slot, start, start + n) for slot, (start, n) in enumerate(zip(starts, lengths, strict=True))]
        dealt = list(passes(spans))
        for part in dealt:
            assert len(part) * max(span.rows for span in part) <= MAX_ROWS
            assert len({span.slot for span in part}) == len(part), "a slot's rows of one pass would not see each other"
        for span in spans:
            own = [each for part in dealt for each in part if each.slot == span.slot]
            assert [row for each in own for row in range(each.start, each.end)] == list(range(span.start, span.end))

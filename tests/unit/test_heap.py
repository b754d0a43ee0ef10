from __future__ import annotations

import gc

from miles import heap


def test_what_lives_before_is_frozen_inside_the_block_alone() -> None:
    before = gc.get_freeze_count()
    with heap.frozen():
        assert gc.get_freeze_count() > before + 1000
    assert gc.get_freeze_count() == 0

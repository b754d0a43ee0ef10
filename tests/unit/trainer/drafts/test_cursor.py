from __future__ import annotations

import pytest

from miles.services.trainer.drafts.cursor import RecordingCursor


@pytest.mark.parametrize(
    ("last", "there", "expected"),
    [(-1, [], None), (-1, [0], 0), (0, [0, 1], 1), (0, [2, 3], 2), (3, [2, 3], None), (3, [5, 4], 4)],
)
def test_the_oldest_that_was_not_dealt_with_is_next(last: int, there: list[int], expected: int | None) -> None:
    assert RecordingCursor(last).next(there) == expected


def test_gaps_are_counted_as_missed() -> None:
    cursor = RecordingCursor(2)
    assert list(cursor.reach(3)) == []
    cursor.done(3)
    assert list(cursor.reach(6)) == [4, 5]
    cursor.gone(6)
    assert (cursor.missed, cursor.last) == (3, 6)


def test_a_policy_that_is_taken_back_takes_the_cursor_with_it() -> None:
    cursor = RecordingCursor(9, missed=1)
    cursor.rewind(12)
    assert cursor.last == 9
    cursor.rewind(4)
    assert (cursor.last, cursor.missed, cursor.next([3, 4])) == (3, 1, 4)

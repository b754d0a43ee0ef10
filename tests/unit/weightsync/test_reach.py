"""When a version in GPU memory helps no engine any more."""

from __future__ import annotations

import pytest

from miles.services.weightsync.engine import Engine
from miles.services.weightsync.reach import reached_by_none

SERVES = Engine("serves", session=1, held=7)
GONE = Engine("gone", held=7)
NEAR = Engine("near", session=2)
FAR = Engine("far", session=3, out_of_reach={7})
FAILED = Engine("failed", session=4)


@pytest.mark.parametrize(
    ("engines", "lost"),
    [
        ([], False),
        ([GONE], False),
        ([FAR], True),
        ([GONE, FAR, FAILED], True),
        ([FAR, NEAR], False),
        ([FAR, SERVES], False),
    ],
    ids=["no engine", "away", "far", "far and failed", "one can load it", "one serves it"],
)
def test_a_version_is_out_of_reach_when_engines_are_attached_and_none_has_it_or_can_get_it(
    engines: list[Engine], lost: bool
) -> None:
    assert reached_by_none(7, engines, lambda name: name == "failed") is lost

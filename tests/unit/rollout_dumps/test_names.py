"""Templates of dumped files."""

from __future__ import annotations

import pytest

from miles.rollout_dumps.names import changes_with, why_no_template


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("d/{rollout_id}.pt", True),
        ("d/{rollout_id:05d}.pt", True),
        ("d/{{x}}.pt", True),
        ("d/{step}.pt", False),
        ("d/{}.pt", False),
        ("d/{rollout_id", False),
        ("d/{rollout_id.__doc__}", False),
        ("d/{rollout_id:/>9}", False),
        ("d/{rollout_id!r}", False),
    ],
)
def test_a_template_has_its_own_placeholders_alone(text: str, fits: bool) -> None:
    assert (why_no_template(text, "rollout_id") == "") is fits


def test_a_template_may_name_one_file_for_all() -> None:
    assert changes_with("{rollout_id}_{rank}.pt", "rank", "rollout_id")
    assert not changes_with("{rollout_id}.pt", "rank", "rollout_id")

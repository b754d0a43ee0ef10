"""Tables of speculative decoding, as they are printed."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from miles.client.commands.acceptance import acceptance_table, engines_table

COUNTED = {"policy_version": 12, "draft_version": 3, "verifications": 400, "proposed": 1200, "accepted": 560,
           "accept_length": 2.4, "accept_rate": 560 / 1200}  # fmt: skip
NOTHING = {"policy_version": 0, "draft_version": None, "verifications": 0, "proposed": 0, "accepted": 0,
           "accept_length": None, "accept_rate": None}  # fmt: skip


def printed(table: Table) -> list[list[str]]:
    """The cells of a table's rows."""
    out = io.StringIO()
    Console(file=out, width=200, no_color=True).print(table)
    rows = [line for line in out.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def test_each_pair_of_versions_has_a_row() -> None:
    rows = printed(acceptance_table([NOTHING, COUNTED]))
    assert rows == [["0", "", "", "", "0"], ["12", "3", "2.40", "46.7%", "400"]]


def test_an_engine_has_its_newest_versions_and_why_it_does_not_draft() -> None:
    engines = [
        {"engine": "rollout-0", "num_steps": 3, "reason": None, "speedup": 1.4, "acceptance": [NOTHING, COUNTED]},
        {"engine": "rollout-1", "num_steps": 0, "reason": "drafts [do] not pay", "speedup": None, "acceptance": []},
    ]
    first, second = printed(engines_table(engines))
    assert first == ["rollout-0", "up to 3", "1.40", "12", "3", "2.40", "46.7%", "400"]
    assert second[:3] == ["rollout-1", "off: drafts [do] not pay", ""]

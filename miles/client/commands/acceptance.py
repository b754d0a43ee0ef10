"""Tables of speculative decoding: what each engine drafts, and what each version of the policy accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from miles.launcher.console import plain

if TYPE_CHECKING:
    from miles.client.client import Json


def acceptance_table(acceptance: Sequence[Mapping[str, Any]]) -> Table:
    """Return what became of drafts, a row for each pair of versions."""
    table = Table(*_COLUMNS)
    for each in acceptance:
        table.add_row(*_cells(each))
    return table


def engines_table(engines: Sequence[Json]) -> Table:
    """Return how each engine drafts, with what its newest pair of versions accepted."""
    table = Table("engine", "drafts", "speed-up", *_COLUMNS)
    for engine in engines:
        newest = engine["acceptance"][-1:]
        drafts = f"up to {engine['num_steps']}" if engine["num_steps"] else "off"
        if engine["reason"]:
            drafts += f": {engine['reason']}"
        table.add_row(
            plain(engine["engine"]),
            plain(drafts),
            "" if engine["speedup"] is None else f"{engine['speedup']:.2f}",
            *(_cells(newest[0]) if newest else ()),
        )
    return table


_COLUMNS = ("policy", "draft", "tokens per verification", "accepted share", "verifications")


def _cells(each: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(each["policy_version"]),
        "" if each["draft_version"] is None else str(each["draft_version"]),
        "" if each["accept_length"] is None else f"{each['accept_length']:.2f}",
        "" if each["accept_rate"] is None else f"{each['accept_rate']:.1%}",
        str(each["verifications"]),
    )

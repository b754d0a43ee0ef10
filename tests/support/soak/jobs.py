"""The jobs of a soak, as the soak knows them."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from soak.recipes import RECIPES, Recipe
from soak.schedule import JobView
from soak.watcher import Watcher

ENDED = frozenset({"succeeded", "failed", "cancelled", "stopped"})


@dataclasses.dataclass
class SoakJob:
    """One job that was accepted."""

    number: int
    kind: str
    """Name of its recipe."""
    id: str
    body: dict[str, Any]
    watcher: Watcher
    state: str = "queued"
    steps: int = 0
    asked: set[str] = dataclasses.field(default_factory=set)
    """Actions that were accepted."""
    ended_s: float | None = None
    checked: bool = False
    """What it left was looked at since it ended."""

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.kind]

    @property
    def run_dir(self) -> pathlib.Path:
        return pathlib.Path(self.body["run_dir"])

    @property
    def open(self) -> bool:
        return self.state not in ENDED

    @property
    def view(self) -> JobView:
        return JobView(self.number, self.recipe.good, self.state)

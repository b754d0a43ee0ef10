"""How a job may end."""

from __future__ import annotations

import re

from soak.recipes import Recipe

ASKED_FOR = {"stopped": "stop", "cancelled": "cancel"}


def outcome_faults(recipe: Recipe, state: str, error: str, asked: set[str]) -> list[str]:
    """Faults of an end: `error` is what the job says of it, `asked` the actions that were accepted."""
    if state in ASKED_FOR:
        return [] if ASKED_FOR[state] in asked else [f"it was {state}, and nobody asked for that"]
    if recipe.good:
        return [] if state == "succeeded" else [f"it {state}: {error}"]
    if state == "succeeded" and recipe.may_succeed:
        return []
    if state != "failed":
        return [f"it {state}, though it cannot work"]
    if re.search(recipe.because, error, re.IGNORECASE) is None:
        return [f"its error does not say why (nothing like {recipe.because!r}): {error!r}"]
    return []

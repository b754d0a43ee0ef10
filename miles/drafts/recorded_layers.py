"""Which hidden states a draft reads, by SGLang's numbers, and the trainer therefore records."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from miles.config.checks.json_file import read_json_object
from miles.config.speculation import DraftKind, Speculation
from miles.drafts.head_config import LAYER_IDS

if TYPE_CHECKING:
    from collections.abc import Sequence

EMBEDDING = -1
"""Key of the rows of the embedding table among recorded layers."""


def aux_layers(draft_folder: str | None, num_layers: int) -> tuple[int, ...]:
    """The layers, from 0, whose output an EAGLE-3 head reads, ascending, which is how SGLang concatenates them.

    They are those that the draft's config.json names, or SGLang's default, of which a model with few layers has fewer.
    SGLang reads them on the way into the next layer, so the last layer, number `num_layers` - 1, is none of them.
    Raises ValueError for layers that the policy does not have.
    """
    named = None if draft_folder is None else _named(pathlib.Path(draft_folder) / "config.json")
    last = num_layers - 2
    if named is None:
        return tuple(sorted({min(max(layer, 0), last) for layer in (1, num_layers // 2 - 1, num_layers - 4)}))
    if not named or not all(0 <= layer <= last for layer in named):
        raise ValueError(
            f"{LAYER_IDS} of {draft_folder} is {list(named)}, but the policy has {num_layers} "
            f"layers: a draft for it reads what is behind some of layers 0 to {last}"
        )
    return tuple(sorted(set(named)))


def recorded_layers(speculation: Speculation, num_layers: int) -> tuple[int, ...]:
    """Keys of `RecordedSample.hidden_TD` for a kind of draft, ascending; none for drafts that read tokens alone."""
    if speculation.kind is not DraftKind.EAGLE3:
        return ()
    return tuple(sorted({EMBEDDING, *aux_layers(speculation.draft_model_path, num_layers)}))


def _named(path: pathlib.Path) -> Sequence[int] | None:
    """SGLang reads `eagle_config` alone."""
    layers = (read_json_object(path).get("eagle_config") or {}).get(LAYER_IDS)
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"{LAYER_IDS} in {path} is {layers!r}; it must list layer numbers")
    return layers

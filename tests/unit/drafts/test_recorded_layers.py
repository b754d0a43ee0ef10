"""The layers that are recorded are those that SGLang gives an EAGLE-3 head."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from miles.config.speculation import DraftKind, Speculation
from miles.drafts.recorded_layers import EMBEDDING, aux_layers, recorded_layers


def _draft(folder: pathlib.Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("layers", "expected"), [(32, (1, 15, 28)), (7, (1, 2, 3)), (4, (0, 1)), (3, (0, 1)), (2, (0,))]
)
def test_by_default_they_are_those_of_sglang(tmp_path: pathlib.Path, layers: int, expected: tuple[int, ...]) -> None:
    assert aux_layers(None, layers) == expected
    assert aux_layers(_draft(tmp_path, {"eagle_config": None}), layers) == expected


def test_a_draft_names_its_own_and_they_are_read_in_the_order_of_the_policy(tmp_path: pathlib.Path) -> None:
    folder = _draft(tmp_path, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [10, 0, 30]}})
    assert aux_layers(folder, 32) == (0, 10, 30)
    assert recorded_layers(Speculation(DraftKind.EAGLE3, folder), 32) == (EMBEDDING, 0, 10, 30)


@pytest.mark.parametrize("named", [[], [31], [-1, 2], [1, 99]])
def test_layers_that_the_policy_lacks_are_refused(tmp_path: pathlib.Path, named: list[int]) -> None:
    folder = _draft(tmp_path, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": named}})
    with pytest.raises(ValueError, match=r"layers 0 to 30"):
        aux_layers(folder, 32)


@pytest.mark.parametrize("named", ["1,2", [1.5], [True]])
def test_what_are_no_layers_is_refused(tmp_path: pathlib.Path, named: object) -> None:
    folder = _draft(tmp_path, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": named}})
    with pytest.raises(ValueError, match="must list layer numbers"):
        aux_layers(folder, 32)


@pytest.mark.parametrize("kind", [DraftKind.STANDALONE, DraftKind.MTP, DraftKind.NGRAM, DraftKind.NONE])
def test_other_drafts_read_none(kind: DraftKind) -> None:
    assert recorded_layers(Speculation(kind), 32) == ()

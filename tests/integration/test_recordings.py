"""What ranks of Megatron-Core record together for the draft model, in layouts that rarely break.

Those that every change is tried on are in `test_megatron_layouts.py`, whose processes run them too.
"""

from __future__ import annotations

import pathlib

import pytest
import torch
from megatron_kit import needs_megatron, run_cases
from megatron_models import write_model
from recorded_cases import LAYOUTS, OFTEN, assert_recorded, megatron_cases, plain_case, recorded_case
from safetensors.torch import load_file

from miles.drafts.recordings import steps

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800), needs_megatron]

MODELS = {"dense": "Llama", "tied": "Llama, tied", "moe": "Qwen3-MoE", "predicting": "GLM-4.5, MTP"}
MODELS["local-global"] = "Gemma 3"
SELDOM = tuple(name for name in LAYOUTS if name not in OFTEN)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with what every layout has recorded."""
    out = tmp_path_factory.mktemp("recordings")
    for name, family in MODELS.items():
        write_model(family, out / name)
    for ranks in (2, 4):
        run_cases(megatron_cases(out, tuple(n for n in SELDOM if LAYOUTS[n][0] == ranks)), out, ranks=ranks)
    run_cases([recorded_case("recorded", "dense", out), plain_case("plain", "dense", out)], out)
    return out


@pytest.mark.parametrize("name", SELDOM)
def test_a_layout_records_what_the_stock_model_computes(results: pathlib.Path, name: str) -> None:
    assert_recorded(results, name)


def test_recording_changes_no_bit_of_what_megatron_trains(results: pathlib.Path) -> None:
    recorded, plain = (load_file(results / f"{name}.safetensors") for name in ("recorded", "plain"))
    assert all(torch.equal(recorded[name], plain[name]) for name in plain)
    assert steps(results / "recorded-recordings") == [0]

"""The benchmark of the draft trainer with tiny shapes: its recordings are read, and its models learn from them."""

from __future__ import annotations

import pathlib

import pytest
import torch

from benchmarks.gpu.draft_learner import COLUMNS, Clock, flops, measure
from benchmarks.gpu.draft_shapes import HEAD, SHAPES, SMALL, load_model, tiny, write_model, write_recording
from miles.drafts import recordings

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["standalone, 135 M", "EAGLE-3, 16,384 tokens"])
def test_a_row_has_every_column(name: str, tmp_path: pathlib.Path) -> None:
    row = measure(name, tiny(SHAPES[name]), Clock(CPU, 1), tmp_path, tmp_path / "profiles")
    assert len(row) == len(COLUMNS)
    assert len(list((tmp_path / "profiles").iterdir())) == 1


def test_a_recording_has_about_as_many_tokens_as_it_shall(tmp_path: pathlib.Path) -> None:
    shape = tiny(HEAD)
    write_recording(shape, tmp_path, 3)
    samples = recordings.read(tmp_path, 3)
    assert sum(len(sample.tokens_T) for sample in samples) == pytest.approx(shape.recorded_tokens, rel=0.2)
    assert {tuple(sample.hidden_TD) for sample in samples} == {shape.recorded_layers}


def test_products_are_counted_by_matrix(tmp_path: pathlib.Path) -> None:
    shape = tiny(SMALL)
    write_model(shape, tmp_path)
    module = load_model(shape, tmp_path, CPU).module
    head, per_layer = 128 * 32, 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert flops(shape, module, 100, 60) == 6 * (100 * 2 * per_layer + 60 * head)

"""Gradient norms in files."""

from __future__ import annotations

import pathlib

import pytest
import torch
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.config.sections.debug import DebugConfig
from miles.services.trainer.step.gradient_norms import GradientNorm, GradientNormError, save_and_compare


def debug(**settings: str) -> DebugConfig:
    return JobConfig.from_flat({**MINIMAL, **settings}).debug


def test_norms_of_another_run_are_close(tmp_path: pathlib.Path) -> None:
    name = f"{tmp_path}/new/{{role}}_{{rollout_id}}_{{step_id}}.pt"
    save_and_compare(debug(ci_save_grad_norm=name), 3, [GradientNorm("actor", 0, 2.0), GradientNorm("critic", 1, 4.0)])
    assert torch.load(tmp_path / "new" / "critic_3_1.pt", weights_only=True) == 4.0
    compared = debug(ci_load_grad_norm=name)
    save_and_compare(compared, 3, [GradientNorm("actor", 0, 2.05), GradientNorm("critic", 1, 3.9)])
    with pytest.raises(
        GradientNormError, match=r"actor's gradient norm in optimizer step 0 of rollout 3 is 2\.1, and 2"
    ):
        save_and_compare(compared, 3, [GradientNorm("actor", 0, 2.1)])
    with pytest.raises(FileNotFoundError):
        save_and_compare(compared, 4, [GradientNorm("actor", 0, 2.0)])


def test_a_file_without_a_number_is_refused(tmp_path: pathlib.Path) -> None:
    name = f"{tmp_path}/{{rollout_id}}_{{step_id}}.pt"
    for text, words in (("{}", "no file that torch.save wrote"), (None, "holds a list instead of a number")):
        path = tmp_path / "0_0.pt"
        path.write_text(text) if text is not None else torch.save([1.0], path)
        with pytest.raises(ValueError, match=words):
            save_and_compare(debug(ci_load_grad_norm=name), 0, [GradientNorm("actor", 0, 1.0)])

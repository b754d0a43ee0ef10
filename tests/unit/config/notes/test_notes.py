from __future__ import annotations

from config_cases import MINIMAL

from miles.config.job import examine
from miles.config.notes import notes


def test_a_statement_that_is_true_is_noted_and_changes_nothing() -> None:
    settings = examine({**MINIMAL, "attention_softmax_in_fp32": True, "train_backend": "megatron"}).settings
    assert [str(note) for note in notes(settings)] == [
        "attention_softmax_in_fp32 = true: it changes nothing: the softmax of attention is computed in float32"
    ]


def test_nothing_is_noted_of_what_was_not_given() -> None:
    assert notes(examine(MINIMAL).settings) == []


def test_names_for_a_tracker_that_is_off_are_noted() -> None:
    settings = examine({**MINIMAL, "wandb_project": "p", "wandb_key": "k"}).settings
    assert [str(note) for note in notes(settings)] == [
        "wandb_key = [redacted]: it does nothing without use_wandb",
        "wandb_project = p: it does nothing without use_wandb",
    ]

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


def test_settings_that_change_nothing_are_noted() -> None:
    given = {"megatron_to_hf_mode": "bridge", "skip_actor_forward_only": True, "balance_data": True, "finetune": True}
    found = notes(examine({**MINIMAL, **given, "ref_load": "x", "train_backend": "megatron"}).settings)
    assert {note.field for note in found} == {*given, "ref_load"}

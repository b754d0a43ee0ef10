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


def test_kernels_that_this_device_does_not_have_are_noted() -> None:
    kernels = {"moe_grouped_gemm": True, "moe_permute_fusion": True, "attention_backend": "flash"}
    found = notes(examine({**MINIMAL, "device": "cpu", "train_backend": "megatron", **kernels}).settings)
    assert [note.field for note in found] == list(kernels)
    assert str(found[0]) == (
        "moe_grouped_gemm = true: it changes nothing here: it needs TransformerEngine, and device is cpu; layers "
        "without it compute one expert after the other"
    )
    assert notes(examine({**MINIMAL, "device": "cuda", "train_backend": "megatron", **kernels}).settings) == []


def test_a_policy_and_a_loss_that_do_nothing_are_noted() -> None:
    nothing = {"moe_token_drop_policy": "probs", "moe_router_load_balancing_type": "seq_aux_loss"}
    found = notes(examine({**MINIMAL, "train_backend": "megatron", **nothing}).settings)
    assert [str(note) for note in found] == [
        "moe_token_drop_policy = probs: it changes nothing: experts have no capacity, so no token is dropped",
        "moe_router_load_balancing_type = seq_aux_loss: it changes nothing: moe_aux_loss_coeff is 0",
    ]

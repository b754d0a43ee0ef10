from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.config.schema.catalog import catalog
from miles.config.schema.hints import distance, nearest
from miles.config.schema.other_names import other_names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rollout-batch-size", "rollout_batch_size"),
        ("rollout_batchsize", "rollout_batch_size"),
        ("Rollout_Batch_Size", "rollout_batch_size"),
        ("batch_size_rollout", "rollout_batch_size"),
        ("rolout_batch_size", "rollout_batch_size"),
        ("rollout_bacth_size", "rollout_batch_size"),
        ("rollout_batch", "rollout_batch_size"),
        ("rollout_bat", "rollout_batch_size"),
        ("lrr", "lr"),
        ("use_tiss", "use_tis"),
        ("rm_typ", "rm_type"),
        ("use_partial_rollout", "partial_rollout"),
        ("num_rollouts", "num_rollout"),
        ("update_weight_mode", "update_weight_transfer_mode"),
        ("n_sample_per_prompt", "n_samples_per_prompt"),
        ("tensor_model_paralel_size", "tensor_model_parallel_size"),
        ("normalise_advantages", "normalize_advantages"),
    ],
)
def test_a_close_name_is_meant(name: str, meant: str) -> None:
    assert nearest(name, catalog()) == meant


@pytest.mark.parametrize(
    "name",
    [
        "",
        "tp",
        "rollout",
        "use_wandb",
        "wandb_dir",
        "wandb_key",
        "offload",
        "bf16",
        "num_experts",
        "num_layers",
        "hidden_dropout",
        "rope_type",
        "cp_comm_type",
        "ref_micro_batch_size",
        "use_dynamic_global_batch_size",
        "lr_wsd_decay_iters",
        "rollout_max_len",  # of the prompt, the response, or both
        "custom_generate_function_path",
        "miles_router_timeout",
        "optimizer_cpu_offload",
        "update_weight_delta_checksum",
        "q_lora_rank",
        "use_kl_losses_of_the_reference",
    ],
)
def test_a_name_that_means_something_else_gets_no_hint(name: str) -> None:
    known = {key for key in catalog() if key != name}
    assert nearest(name, known) is None


def test_other_names_are_of_settings_and_are_none_themselves() -> None:
    known = catalog()
    wrong = [(name, key) for name, key in other_names().items() if name in known or key not in known]
    assert [(name, key) for name, key in wrong if not key.startswith("sglang_")] == []


@pytest.mark.hypothesis
@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_the_distance_is_symmetric_and_0_for_equal_words_alone(one: str, other: str) -> None:
    assert distance(one, other) == distance(other, one)
    assert (distance(one, other) == 0) == (one == other)
    assert distance(one, other) <= max(len(one), len(other))

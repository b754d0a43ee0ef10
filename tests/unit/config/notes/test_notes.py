from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL, faults_for

from miles.config.job import JobConfig, examine
from miles.config.notes import notes
from miles.config.schema.catalog import catalog

MEGATRON = {"train_backend": "megatron"}
ON_A_GPU = {"device": "cuda", "rollout_backend": "sglang", "colocate": True}


def said(**changes: Any) -> list[str]:
    assert faults_for(**changes) == []
    return [str(note) for note in notes(examine(MINIMAL | changes).settings)]


NOTED: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "train_backend": "fsdp"},
        [
            "fp8_format = e4m3: the trainer computes in FP8 (blocks of 128 x 128, scales in float32); it is emulated, "
            "with products of rounded numbers in train_dtype: train_backend = fsdp has no layers of TransformerEngine",
            "rollout_weight_format = auto: engines get FP8 (blocks of 128 x 128, scales in float32), as the trainer "
            "computes",
        ],
    ),
    (
        {
            "fp8_format": "e4m3",
            "fp8_recipe": "mxfp8",
            "rollout_weight_format": "as_trained",
            "device": "cuda",
            **MEGATRON,
        },
        [
            "fp8_format = e4m3: the trainer computes in MXFP8; TransformerEngine's kernels compute it where the GPU "
            "has them, products of rounded numbers elsewhere",
            "rollout_weight_format = as_trained: engines get weights in rollout_dtype, and sample from another "
            "function than is trained: use_tis or use_mis corrects for it",
        ],
    ),
    (
        {"rollout_weight_format": "int4", "int4_group_size": 32},
        [
            "rollout_weight_format = int4: engines get INT4 (groups of 32); the trainer computes in train_dtype, and "
            "use_tis or use_mis corrects for the difference"
        ],
    ),
    (
        {"rollout_backend": "sglang", "sglang_kv_cache_dtype": "fp8_e4m3"},
        [
            "sglang_kv_cache_dtype = fp8_e4m3: engines round keys and values to it, and the trainer does not, so that "
            "their log-probabilities differ by that: use_tis or use_mis corrects for it"
        ],
    ),
    (
        {"sglang_speculative_algorithm": "EAGLE3", "enable_draft_training": True, "device": "cuda", "colocate": True},
        [
            "enable_draft_training = true: draft-trainer-0 trains an EAGLE-3 head, which begins from nothing, in "
            "runs/miles/drafts/initial: until it has learned, most drafts are rejected; it learns the policy's "
            "likeliest tokens, from up to 32768 tokens of each training step as the policy's forward pass saw them, "
            "and engines get a new version after every one that it has learned from",
            "draft_train_device = auto: the draft is trained in the engines' turn, and leaves its GPU for the "
            "trainer's",
        ],
    ),
    (
        {
            "sglang_speculative_algorithm": "STANDALONE",
            "sglang_speculative_draft_model_path": "small",
            "enable_draft_training": True,
            "draft_loss": "ce",
            "draft_update_interval": 3,
        },
        [
            "enable_draft_training = true: draft-trainer-0 trains a small language model, which begins as small; it "
            "learns the tokens that were sampled, from up to 32768 tokens of each training step as the policy's "
            "forward pass saw them, and engines get a new version after every 3 that it has learned from",
        ],
    ),
    (
        {"check_weight_update_equal": True, "check_weight_update_allow_quant_error": True},
        [
            "check_weight_update_allow_quant_error = true: it changes nothing: engines get the trainer's own quantised "
            "numbers, and what they hold is compared bit for bit"
        ],
    ),
    (
        {"attention_softmax_in_fp32": True, **MEGATRON},
        ["attention_softmax_in_fp32 = true: it changes nothing: the softmax of attention is computed in float32"],
    ),
    (
        {"ref_micro_batch_size": 8},
        [
            "ref_micro_batch_size = 8: it changes nothing: the reference computes the policy's micro-batches, with the "
            "same result"
        ],
    ),
    (
        {"check_for_nan_in_loss_and_grad": False},
        [
            "check_for_nan_in_loss_and_grad = false: it changes nothing: the norm of the gradient, which is computed "
            "anyway, is always checked before a step"
        ],
    ),
    (
        {"spec": ["miles_plugins.models.glm4", "get_glm_spec"]},
        [
            'spec = ["miles_plugins.models.glm4", "get_glm_spec"]: layers are built as the model\'s config.json says, '
            "without the plugin"
        ],
    ),
    (
        {"eval_prompt_data": ["a", "b"]},
        ['eval_prompt_data = ["a", "b"]: without eval_interval it is never evaluated on'],
    ),
    (
        {"eval_interval": 5, "eval_temperature": 0.0},
        [
            "eval_interval = 5: nothing is evaluated without eval_prompt_data",
            "eval_temperature = 0.0: nothing is evaluated without eval_prompt_data",
        ],
    ),
    (
        {"eval_interval": 5, "eval_prompt_data": ["/d/aime-2024.jsonl@[0:8]"]},
        [
            'eval_prompt_data = ["/d/aime-2024.jsonl@[0:8]"]: its only word is a file, and aime-2024 the data set\'s '
            "name"
        ],
    ),
    (
        {"rollout_max_context_len": 16},
        ["rollout_max_response_len = 16: responses end earlier, as prompt and response share 16 tokens"],
    ),
    (
        {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 99, "micro_batch_size": 2},
        ["micro_batch_size = 2: use_dynamic_batch_size cuts micro-batches by tokens"],
    ),
    (
        {"max_tokens_per_gpu": 99},
        ["max_tokens_per_gpu = 99: without use_dynamic_batch_size micro-batches have 1 samples each"],
    ),
    (
        {"sequence_parallel": True, **MEGATRON},
        ["sequence_parallel = true: tensor_model_parallel_size = 1 leaves nothing to split"],
    ),
    (
        {"advantage_estimator": "ppo", "num_critic_only_steps": 10},
        ["num_critic_only_steps = 10: num_rollout = 10 leaves none to train the policy on: only the critic is trained"],
    ),
    (
        {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True, "device": "cpu"},
        [
            "optimizer_cpu_offload = true: device = cpu has the optimizer's state in host memory, and in float32",
            "overlap_cpu_optimizer_d2h_h2d = true: device = cpu has the optimizer's state in host memory, and in "
            "float32",
        ],
    ),
    (
        {"echo_loss_coef": 0.05},
        [
            "echo_loss_coef = 0.05: it does nothing without custom_generate_function_path: no other response has "
            "tokens of observations"
        ],
    ),
    (
        {"custom_rm_path": "a.b"},
        ["rm_type = math: custom_rm_path = a.b scores in its place"],
    ),
    (
        {**ON_A_GPU, "rollout_num_gpus": 4, "actor_num_gpus_per_node": 2},
        ["rollout_num_gpus = 4: colocate runs engines on the trainer's 2 GPUs"],
    ),
    (
        {"attention_backend": "flash", "transformer_impl": "local", **MEGATRON},
        [
            "attention_backend = flash: it changes nothing here: it is of TransformerEngine's kernels, and "
            "transformer_impl is local; attention is PyTorch's"
        ],
    ),
    (
        {"apply_rope_fusion": False, "device": "cpu", **MEGATRON},
        ["apply_rope_fusion = false: with device = cpu layers have PyTorch's kernels anyway"],
    ),
    (
        {"keep_old_actor": True},
        [
            "keep_old_actor = true: with max_weight_staleness = 0 every response is of the version that is trained, "
            "and no other is kept"
        ],
    ),
    (
        {"update_weight_transfer_mode": "p2p"},
        [
            "update_weight_transfer_mode = p2p: there is no transport by Mooncake; auto takes the fastest one that the "
            "machines share"
        ],
    ),
    (
        {"update_weight_transfer_mode": "disk-delta", "update_weight_disk_dir": "d"},
        ["update_weight_transfer_mode = disk-delta: it is called disk_delta here"],
    ),
    (
        {"attn_implementation": "flash_attention_3"},
        [
            "attn_implementation = flash_attention_3: auto computes attention by PyTorch's own FlashAttention where it "
            "can, without that package"
        ],
    ),
]


@pytest.mark.parametrize(("changes", "expected"), NOTED, ids=[lines[0][:50] for _, lines in NOTED])
def test_what_is_accepted_and_changes_nothing_is_noted(changes: dict[str, Any], expected: list[str]) -> None:
    assert said(**changes) == expected


def test_nothing_is_noted_of_what_was_not_given() -> None:
    assert said() == []


def test_values_of_other_systems_become_those_of_here() -> None:
    config = JobConfig.from_flat(
        MINIMAL
        | {"update_weight_transfer_mode": "p2p", "attn_implementation": "flash_attention_2", "custom_rm_path": "a.b"}
        | {"eval_interval": 1, "eval_prompt_data": ["d/gsm 8k.parquet"]}
    )
    assert config.weights.update_weight_transfer_mode == "auto"
    assert config.train.attn_implementation == "auto"
    assert config.reward.rm_type is None
    assert config.eval.eval_prompt_data == ("gsm_8k", "d/gsm 8k.parquet")
    assert JobConfig.from_flat(config.to_flat()) == config


@pytest.mark.parametrize("key", [key for key, entry in catalog().items() if entry.ignored is not None])
def test_a_setting_of_no_consequence_begins_without_a_value(key: str) -> None:
    """So that it counts as given only when somebody gave it."""
    assert catalog()[key].default is None


def test_names_for_a_tracker_that_is_off_are_noted() -> None:
    settings = examine({**MINIMAL, "wandb_project": "p", "wandb_key": "k"}).settings
    assert [str(note) for note in notes(settings)] == [
        "wandb_key = [redacted]: it does nothing without use_wandb",
        "wandb_project = p: it does nothing without use_wandb",
    ]


def test_settings_that_change_nothing_are_noted() -> None:
    given = {"megatron_to_hf_mode": "bridge", "skip_actor_forward_only": True, "balance_data": True, "finetune": True}
    found = notes(examine({**MINIMAL, **given, "ref_load": "x", "train_backend": "megatron"}).settings)
    assert {note.field for note in found} == {*given, "ref_load"}


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


def test_a_folder_in_few_bits_says_what_engines_get_and_how_much_of_the_model(tmp_path: pathlib.Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["model.layers.0"]}
    model = {"model_type": "llama", "vocab_size": 512, **sizes, "quantization_config": blocks}
    (tmp_path / "config.json").write_text(json.dumps(model))
    (served,) = said(hf_checkpoint=str(tmp_path))
    assert served == (
        "rollout_weight_format = auto: engines get FP8 (blocks of 128 x 128, scales in float32) for 50.0% of the "
        "layers' weights, as config.json of hf_checkpoint says; the trainer computes in train_dtype, and use_tis or "
        "use_mis corrects for the difference"
    )
    trained, _ = said(hf_checkpoint=str(tmp_path), fp8_format="e4m3", fp8_recipe="blockwise")
    assert "of the layers' weights, as config.json of hf_checkpoint has them; it is emulated" in trained


@pytest.mark.parametrize(
    ("sizes", "layout", "named"),
    [
        ({}, {}, None),
        ({"head_dim": 64}, {}, "model.layers.0.self_attn.q_proj"),
        ({"intermediate_size": 192}, {}, "model.layers.0.mlp.gate_proj"),
        ({"hidden_size": 192}, {}, None),
        ({}, {"tensor_model_parallel_size": 2}, None),
        ({"intermediate_size": 384}, {"tensor_model_parallel_size": 2}, "model.layers.0.mlp.gate_proj"),
    ],
)
def test_kernels_with_other_blocks_than_engines_are_noted(
    tmp_path: pathlib.Path, sizes: dict[str, int], layout: dict[str, int], named: str | None
) -> None:
    model = {
        "model_type": "qwen3", "num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(model | sizes))
    flags = {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "hf_checkpoint": str(tmp_path), "num_gpus_per_node": 2}
    changes = {**MEGATRON, "device": "cuda", "actor_num_gpus_per_node": 2, **flags, **layout}
    noted = [str(note) for note in notes(examine(MINIMAL | changes).settings) if "blocks that it shares" in str(note)]
    assert [f"TransformerEngine's kernels round {named}, among others" in note for note in noted] == (
        [] if named is None else [True]
    )


@pytest.mark.parametrize(
    ("changes", "in_turns"),
    [
        ({}, True),
        ({"offload_rollout": False}, True),
        ({"offload_rollout": False, "offload_train": False}, False),
        ({"offload_rollout": False, "fsdp_cpu_offload": True}, False),
        ({"colocate": False}, False),
        ({"colocate": False, "offload_train": True}, True),
    ],
)
def test_a_draft_leaves_its_gpu_where_trainer_and_engines_take_turns(changes: dict[str, Any], in_turns: bool) -> None:
    draft = {"sglang_speculative_algorithm": "EAGLE3", "enable_draft_training": True}
    noted = notes(examine(MINIMAL | ON_A_GPU | draft | changes).settings)
    (where,) = [note.text for note in noted if note.field == "draft_train_device"]
    assert ("leaves its GPU" in where, "beside what has that GPU" in where) == (in_turns, not in_turns)

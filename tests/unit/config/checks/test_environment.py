from __future__ import annotations

import json
import pathlib
import socket
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.config.checks.dotted_path import why_not_importable
from miles.config.checks.environment import check_environment, environment_faults
from miles.config.job import examine
from miles.config.schema.faults import RunFault
from miles.placement.nodes import parse_cluster


def faults(**changes: Any) -> list[str]:
    return [str(fault) for fault in check_environment(JobConfig.from_flat(MINIMAL | changes))]


def test_the_save_folder_may_be_loaded_from_before_it_exists(files: pathlib.Path) -> None:
    assert faults(load="all/", save="./all") == []
    assert faults(load=str(files / "run" / "checkpoints"), run_dir="run") == []
    assert faults(load="others", save="all") != []


def test_a_run_with_a_checkpoint_of_its_own_needs_no_other(files: pathlib.Path) -> None:
    (files / "all" / "step_00000004").mkdir(parents=True)
    (files / "all" / "step_00000004" / "trainer.json").write_text("{}")
    assert faults(load="gone", save="all") == []
    assert faults(load="all/step_00000004", save="new") == []
    assert faults(load="all/step_00000005", save="new") != []


def test_a_complete_environment_has_no_faults(files: pathlib.Path) -> None:
    assert faults(label_key="answer", prompt_data="prompts.jsonl@[0:1]", save="out/{rollout_id}") == []


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("config.json", "hf_checkpoint = model, but config.json is missing in it"),
        ("tokenizer.json", "hf_checkpoint = model, but there is no tokenizer in it"),
        ("model.safetensors", "hf_checkpoint = model, but there are no weights in it"),
    ],
)
def test_an_incomplete_model_is_noticed(files: pathlib.Path, missing: str, expected: str) -> None:
    (files / "model" / missing).unlink()
    assert [fault[: len(expected)] for fault in faults()] == [expected]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"model_type": "kimi_k9"}, "has no causal language model of type kimi_k9"),
        (
            {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}},
            "FP8 weights have blocks of no",
        ),
    ],
)
def test_a_model_that_nothing_can_take_is_noticed(files: pathlib.Path, model: dict[str, Any], expected: str) -> None:
    (files / "model" / "config.json").write_text(json.dumps(model))
    (fault,) = environment_faults(examine(MINIMAL).settings)
    assert expected in str(fault)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hf_checkpoint": "nowhere"}, "hf_checkpoint = nowhere, but there is no such folder"),
        (
            {"hf_checkpoint": "Qwen/Qwen3-0.6B"},
            "hf_checkpoint = Qwen/Qwen3-0.6B, but there is no such folder, and models of the Hugging Face hub are not",
        ),
        (
            {"hf_checkpoint": "https://huggingface.co/Qwen/Qwen3-0.6B"},
            "check the path, or `hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` and give Qwen3-0.6B",
        ),
        ({"ref_load": "nowhere"}, "ref_load = nowhere, but there is no such folder"),
        (
            {"advantage_estimator": "ppo", "critic_load": "nowhere"},
            "critic_load = nowhere, but there is no such folder",
        ),
        (
            {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": "nowhere"},
            "opd_teacher_load = nowhere, but there is no such folder",
        ),
        (
            {"lora_rank": 4, "lora_adapter_path": "model"},
            "lora_adapter_path = model, but adapter_config.json is missing in it",
        ),
        ({"load": "nowhere"}, "load = nowhere, but there is no such folder"),
        ({"load": "other"}, "load = other, but it is a Hugging Face model, such as save_hf writes; give it as hf_che"),
        (
            {"ref_load": "dist"},
            "ref_load = dist, but it is a torch_dist checkpoint, which train_backend = fsdp does not",
        ),
        (
            {"ref_load": "dist"},
            "`miles convert dist-to-hf --hf-checkpoint model --load dist --save dist-hf` and give dist-hf, or train",
        ),
        (
            {"ref_load": "dist", "ref_ckpt_step": 7, "train_backend": "megatron"},
            "ref_load = dist, but there are no torch_dist files in iter_0000007; copy the whole checkpoint again",
        ),
        ({"load": "dist"}, "load = dist, but it is a checkpoint of Megatron-LM, which train_backend megatron alone"),
        (
            {"load": "own", "finetune": True},
            "finetune = true, but load holds own/step_00000004, which is resumed whole",
        ),
        ({"load": "prompts.jsonl"}, "load = prompts.jsonl, but it is a file"),
        ({"apply_chat_template": True}, "apply_chat_template = true, but the tokenizer in model has no chat template"),
        (
            {"apply_chat_template": True, "chat_template_path": "x.jinja"},
            "chat_template_path = x.jinja, but there is no such file",
        ),
        ({"prompt_data": "x.jsonl"}, "prompt_data = x.jsonl, but there is no such file"),
        ({"prompt_data": "x.csv"}, "prompt_data = x.csv, but its type is not known"),
        ({"prompt_data": "prompts.jsonl@[x]"}, "prompt_data = prompts.jsonl@[x], but its slice is malformed"),
        ({"prompt_data": "rewards.py@[:1]"}, "prompt_data = rewards.py@[:1], but its type is not known"),
        (
            {"input_key": "question"},
            "input_key = question, but prompts.jsonl has no such column; set it to one of answer, input",
        ),
        ({"label_key": "label"}, "label_key = label, but prompts.jsonl has no such column"),
        (
            {"eval_prompt_data": ["a", "x.jsonl"], "eval_interval": 1},
            "eval_prompt_data = x.jsonl, but there is no such file",
        ),
        (
            {"eval_prompt_data": ["a", "prompts.jsonl"], "eval_interval": 1, "eval_label_key": "no"},
            "eval_label_key = no, but prompts.jsonl has no such column",
        ),
        ({"run_dir": "prompts.jsonl/run"}, "prompts.jsonl is not a folder"),
        (
            {"custom_rm_path": "rewards.scor", "rm_type": None},
            "custom_rm_path = rewards.scor, but rewards defines no scor",
        ),
        (
            {"custom_rm_path": "reward.score", "rm_type": None},
            "custom_rm_path = reward.score, but there is no module reward",
        ),
        ({"host": "no-such-host.invalid"}, "host = no-such-host.invalid, but it cannot be resolved"),
    ],
)
def test_what_is_missing_is_named(files: pathlib.Path, changes: dict[str, Any], expected: str) -> None:
    found = faults(**changes)
    assert len(found) == 1
    assert expected in found[0]


def test_weights_may_be_in_torch_dist_with_megatron(files: pathlib.Path) -> None:
    changes = {"train_backend": "megatron", "use_kl_loss": True}
    assert faults(**changes, ref_load="dist") == []
    assert faults(**changes, load="dist", finetune=True, no_load_optim=True, no_load_rng=True) == []
    assert faults(**changes, load="dist/release", save="saved") == []
    assert faults(load="model") == []  # the weights that it starts from anyway


def test_a_chat_template_is_found_where_tokenizers_keep_it(files: pathlib.Path) -> None:
    settings = files / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert faults(apply_chat_template=True) == []
    settings.unlink()
    (files / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert faults(apply_chat_template=True) == []


def test_a_first_line_that_is_no_object_is_noticed(files: pathlib.Path) -> None:
    (files / "prompts.jsonl").write_text("[1]\n")
    assert faults() == [
        "prompt_data = prompts.jsonl, but its first line is not a JSON object; write one JSON object a line"
    ]


def test_ports_in_use_are_noticed(files: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (fault,) = faults(controller_port=port)
        assert fault.startswith(f"controller_port = {port}, but 127.0.0.1:{port} cannot be listened on")
        (fault,) = faults(rollout_port=port - 1, rollout_num_workers=2)
        assert fault.startswith(f"rollout_port = {port}, but")
    assert faults(controller_port=port) == []


def test_gpus_that_are_not_there_are_noticed(files: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (fault,) = faults(device="cuda")
    assert fault.startswith("device = cuda, but this machine has no GPU to use")


def test_several_faults_are_all_found(files: pathlib.Path) -> None:
    assert len(faults(hf_checkpoint="no", prompt_data="no.jsonl", load="nothing", run_dir="prompts.jsonl/x")) == 4


def test_functions_are_found_without_running_their_module(files: pathlib.Path) -> None:
    assert why_not_importable("rewards.score") is None
    assert why_not_importable("rewards.LIMIT") is None
    assert why_not_importable("json.loads") is None
    assert why_not_importable("math.sqrt") is None
    assert why_not_importable("nothing.here.x") is not None
    (files / "broken.py").write_text("def f(:\n")
    assert "does not parse (line 1" in (why_not_importable("broken.f") or "")
    (files / "package").mkdir()
    (files / "package" / "__init__.py").write_text("1 / 0\n")
    (files / "package" / "inner.py").write_text("")
    assert "ZeroDivisionError" in (why_not_importable("package.inner.f") or "")


def test_a_built_in_filter_goes_by_its_usual_name(files: pathlib.Path) -> None:
    hub = "miles.rollout.filter_hub.dynamic_sampling_filters"
    assert faults(dynamic_sampling_filter_path=f"{hub}.check_reward_nonzero_std") == []
    assert len(faults(dynamic_sampling_filter_path=f"{hub}.another")) == 1


def test_rows_name_their_reward_where_no_setting_does(files: pathlib.Path) -> None:
    (fault,) = faults(rm_type=None)
    assert fault.startswith(
        "rm_type is not set, and neither are custom_rm_path and reward_service, and the first row of prompts.jsonl "
        "names no reward; set one of them"
    )
    row = {"input": "2+2", "answer": "4", "metadata": {"rm_type": "math"}}
    (files / "prompts.jsonl").write_text(json.dumps(row))
    assert faults(rm_type=None) == []


def test_gpus_that_do_not_suffice_are_noticed(files: pathlib.Path) -> None:
    flat = MINIMAL | {"device": "cuda", "actor_num_gpus_per_node": 2, "rollout_num_workers": 3}
    settings = examine(flat).settings
    assert environment_faults(settings, parse_cluster("5")) == []
    (fault,) = environment_faults(settings, parse_cluster("4"))
    assert str(fault).startswith("rollout_num_workers = 3, but the trainer's 2 leave 2 of the 4 GPUs")
    (files / "model" / "model.safetensors").unlink()
    (fault,) = environment_faults(settings, parse_cluster("5"))
    assert isinstance(fault, RunFault)

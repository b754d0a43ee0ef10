"""What is published under a contract, and how it is told from anything else."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from megatron_models import write_model
from safetensors.torch import load_file
from trainer_cases import job_config
from transformers import Qwen3MoeConfig

from miles.weights.naming.contract import WeightContract, contract_of
from miles.weights.naming.model_tensors import read_model_tensors
from miles.weights.naming.published import PublishedTensors, published_tensors, refuse_misfits

CHECKPOINT = WeightContract(form="checkpoint")
MEGATRON = {"train_backend": "megatron", "rollout_backend": "sglang", "mtp_num_layers": 1}
NEXTN = {"sglang_args": {"speculative_algorithm": "NEXTN"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rollout_backend": "torch"}, WeightContract(form="module")),
        ({"rollout_backend": "sglang"}, CHECKPOINT),
        (MEGATRON, CHECKPOINT),
        ({**MEGATRON, **NEXTN}, WeightContract(form="checkpoint", mtp=True)),
        ({**MEGATRON, **NEXTN, "mtp_num_layers": None}, CHECKPOINT),
        ({"rollout_backend": "sglang", **NEXTN}, CHECKPOINT),
        (
            {**MEGATRON, "sglang_args": {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": "x"}},
            CHECKPOINT,
        ),
    ],
)
def test_the_contract_follows_from_the_configuration(
    tmp_path: pathlib.Path, changes: dict[str, Any], expected: WeightContract
) -> None:
    flat = {**changes}
    flags = flat.pop("sglang_args", {})
    flat |= {f"sglang_{name}": value for name, value in flags.items()} | ({"device": "cuda"} if flags else {})
    assert contract_of(job_config(write_config(tmp_path), **flat)) == expected


def write_config(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A folder with the configuration of a small mixture of experts, without weights."""
    sizes: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "num_experts": 4,
    }  # fmt: skip
    Qwen3MoeConfig(**{**sizes, **changes}).save_pretrained(folder)
    return folder


def test_a_tied_head_is_broadcast_by_both_names_to_an_engine_that_keeps_it_apart(tmp_path: pathlib.Path) -> None:
    folder = write_config(tmp_path, tie_word_embeddings=True)
    broadcast = {"rollout_engine_weights": "distributed", "update_weight_transfer_mode": "broadcast"}
    once = published_tensors(job_config(folder, rollout_backend="sglang"))
    twice = published_tensors(job_config(folder, rollout_backend="sglang", **broadcast))
    assert twice.shapes.keys() - once.shapes.keys() == {"lm_head.weight"}
    embeddings = torch.zeros(twice.shapes["lm_head.weight"])
    sent = dict(twice.from_checkpoint([("model.embed_tokens.weight", embeddings)]))
    assert sent == {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings}


def test_prediction_layers_are_published_where_they_are_wanted_alone(tmp_path: pathlib.Path) -> None:
    folder = write_model("GLM-4.5, MTP", tmp_path / "model")
    model, files = read_model_tensors(folder), load_file(folder / "model.safetensors")
    assert len(model.mtp) > 20
    for contract in (CHECKPOINT, WeightContract(form="checkpoint", mtp=True), WeightContract(form="module")):
        published = PublishedTensors(model, contract)
        own = ((name, tensor) for name, tensor in files.items() if name in model.mtp or not_mtp(name))
        found = {name: tuple(tensor.shape) for name, tensor in published.from_checkpoint(own)}
        assert found == dict(published.shapes)
        assert (model.mtp.keys() <= found.keys()) is contract.mtp


def not_mtp(name: str) -> bool:
    return not name.startswith("model.layers.4.")


def test_the_type_of_a_tensor_is_that_asked_for_but_for_what_routers_add(tmp_path: pathlib.Path) -> None:
    model = read_model_tensors(write_model("DeepSeek-V3, MTP", tmp_path / "model"))
    bias = [name for name in (*model.module, *model.mtp) if "bias" in name]
    assert len(bias) == 4
    for name in (*model.module, *model.mtp):
        expected = torch.float32 if name in bias else torch.bfloat16
        assert model.exported_dtype(name, torch.float32, torch.bfloat16) == expected
    assert model.exported_dtype("counter", torch.int64, torch.bfloat16) == torch.int64


def test_tensors_that_are_not_to_be_published_are_refused_with_the_form(tmp_path: pathlib.Path) -> None:
    published = PublishedTensors(read_model_tensors(write_config(tmp_path)), CHECKPOINT)
    refuse_misfits(published, published.shapes, "it has")
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight \(8, 16\) is missing.*checkpoint form"):
        refuse_misfits(published, published.model.module, "it has")

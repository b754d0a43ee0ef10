"""Upcycling of a tiny random Llama model: a mixture of experts that gives its answers."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import dense_model, logits
from trainer_cases import write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from examples.smollm2_chain_sum.upcycle import main, upcycle
from miles.weights.naming.model_tensors import read_model_tensors


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize(("experts", "top_k", "router_std"), [(4, 2, 0.02), (3, 3, 1.0)])
def test_the_mixture_gives_the_dense_models_logits(
    experts: int, top_k: int, router_std: float, changes: dict[str, Any]
) -> None:
    dense = dense_model(**changes)
    model = upcycle(dense, experts, top_k, router_std=router_std)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)


def test_the_seed_decides_where_tokens_go() -> None:
    dense = dense_model()
    routers = [upcycle(dense, seed=seed).get_parameter("model.layers.1.mlp.gate.weight") for seed in (0, 0, 1)]
    assert routers[0].equal(routers[1])
    assert not routers[0].equal(routers[2])


def test_every_expert_learns_something_of_its_own() -> None:
    model = upcycle(dense_model())
    model(torch.arange(29)[None], labels=torch.arange(29)[None]).loss.backward()
    for layer in model.model.layers:
        gradients = layer.mlp.experts.down_proj.grad
        assert not any(gradients[expert].equal(gradients[0]) for expert in range(1, 4))
        assert layer.mlp.shared_experts.down_proj.weight.grad.abs().max() > 0  # though its output is zero


def test_a_checkpoint_is_written_with_its_tokenizer(tmp_path: pathlib.Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    main(["--model", str(tmp_path / "dense"), "--out", str(tmp_path / "moe"), "--experts", "3"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert (model.config.model_type, model.config.n_routed_experts) == ("glm4_moe", 3)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "moe").vocab_size > 0


@pytest.mark.parametrize(
    ("changes", "top_k", "message"),
    [
        ({"attention_bias": True}, 2, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}, 2, "rope_type=linear"),
        ({}, 1, "experts per token = 1"),
        ({}, 5, "experts per token = 5: .* experts, 4"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes: dict[str, Any], top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(dense_model(**changes), 4, top_k)


def test_mtp_layers_that_have_learnt_nothing_are_added(tmp_path: pathlib.Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    main(["--model", str(tmp_path / "dense"), "--out", str(tmp_path / "moe"), "--mtp-layers", "2"])
    tensors = read_model_tensors(tmp_path / "moe")
    assert tensors.config.num_nextn_predict_layers == 2
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    expected = {**tensors.conversion.checkpoint_shapes(tensors.module), **tensors.mtp}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)

"""A head that gives scores gives those of its logits, and the gradients."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import torch
from trainer_cases import random_groups, write_dense_model

from miles.services.trainer.backends.fsdp.model.forward import ForwardOptions, forward, log_probs_and_squares
from miles.services.trainer.backends.fsdp.model.scoring_head import PLAIN_HEADS, ScoringHead, put_scoring_head
from miles.services.trainer.backends.fsdp.model.sharded_model import load_hf_model
from miles.services.trainer.batch.packing import pack
from miles.services.trainer.batch.rollout_batch import in_order

pytestmark = pytest.mark.usefixtures("process_group")
OPTIONS = ForwardOptions(torch.device("cpu"), torch.float32, temperature=0.7)
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4, "n_routed_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "pad_token_id": 0,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


class Marked(torch.nn.Module):
    """A head with a fixed output."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output


@pytest.mark.parametrize("model_type", sorted(PLAIN_HEADS))
def test_models_return_what_their_heads_give(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = {"num_key_value_heads": 2, "head_dim": 4} if model_type == "deepseek_v3" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **heads}))
    output = torch.randn(1, 3, 7) * 100
    model.set_output_embeddings(Marked(output))
    with torch.no_grad():
        given = model(input_ids=torch.arange(3)[None], use_cache=False).logits
    assert given is output or torch.equal(given, output)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("entropy", [{}, {"with_entropy": True}, {"with_entropy": True, "entropy_requires_grad": True}])
def test_scores_and_gradients_are_those_of_the_logits(
    tmp_path: pathlib.Path, tied: bool, share_prompts: bool, entropy: dict[str, bool]
) -> None:
    folder = write_dense_model(tmp_path / "model", tied=tied)
    samples = in_order(random_groups(1))
    micro_batch = pack(samples, range(len(samples)), share_prompts=share_prompts)
    results: list[Any] = []
    for limit in (0, OPTIONS.logit_bytes):
        model = load_hf_model(folder, torch.float32, gradient_checkpointing=False)
        put_scoring_head(model)
        assert isinstance(model.lm_head, ScoringHead)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        options = dataclasses.replace(OPTIONS, logit_bytes=limit)
        found = forward(model, micro_batch, options, **entropy)
        loss = found.log_probs_T @ torch.linspace(-1, 1, len(found.log_probs_T))
        if entropy.get("entropy_requires_grad"):
            loss = loss + found.entropy_T.sum()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((found, gradients))
    (ours, own), (expected, others) = results
    assert torch.equal(ours.log_probs_T, expected.log_probs_T)
    assert (ours.entropy_T is None) == (expected.entropy_T is None)
    if ours.entropy_T is not None:
        assert torch.equal(ours.entropy_T, expected.entropy_T)
        assert ours.entropy_T.requires_grad == expected.entropy_T.requires_grad
    assert own.keys() == others.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_sums_of_squares_come_with_the_same_log_probs(tmp_path: pathlib.Path, share_prompts: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_dense_model(tmp_path / "model")
    samples = in_order(random_groups(2))
    micro_batch = pack(samples, range(len(samples)), share_prompts=share_prompts)
    model = load_hf_model(folder, torch.float32, gradient_checkpointing=False)
    put_scoring_head(model)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens.astype("int64"))
        with torch.no_grad():
            logits = stock(tokens[None]).logits[0, sample.prompt_length - 1 : -1]
        expected.append((logits / OPTIONS.temperature).softmax(-1).square().sum(-1))
    for limit in (0, OPTIONS.logit_bytes):
        options = dataclasses.replace(OPTIONS, logit_bytes=limit)
        with torch.no_grad():
            found_R2 = log_probs_and_squares(model, micro_batch, options)
            plain_R = forward(model, micro_batch, options).log_probs_T
        assert torch.equal(found_R2[:, 0], plain_R)
        torch.testing.assert_close(found_R2[:, 1], torch.cat(expected), rtol=1e-4, atol=1e-6)

"""What a recording must hold: each sample by itself through the stock model."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from miles.drafts.recorded_layers import EMBEDDING
from miles.drafts.recording import RecordedSample
from miles.types import Sample, SampleGroup

TEMPERATURE = {"rollout_temperature": 0.8}
FLAGS: dict[str, Any] = {
    "enable_draft_training": True,
    "rollout_backend": "torch",
    "sglang_speculative_algorithm": "EAGLE3",
    "draft_top_tokens": 5,
    "draft_batch_tokens": 2,
    **TEMPERATURE,
}
"""Of a job whose trainer records."""


def recorded_in(root: pathlib.Path) -> dict[str, str]:
    """Settings that have a run leave its recordings in this folder."""
    return {"draft_recordings_dir": str(root.parent), "run_dir": str(root.parent / "runs" / root.name)}


def samples_of(groups: Sequence[SampleGroup]) -> list[Sample]:
    """The samples of a rollout that are trained on, in the order in which they are recorded."""
    return sorted((s for g in groups for s in g.samples), key=lambda s: (s.group_id, s.index))


def assert_as_the_stock_model(
    model: pathlib.Path,
    found: Sequence[RecordedSample],
    samples: Sequence[Sample],
    layers: Sequence[int],
    *,
    top: int = FLAGS["draft_top_tokens"],
    temperature: float = TEMPERATURE["rollout_temperature"],
) -> None:
    """Compare what was recorded of samples: likeliest tokens as sets exactly, numbers within rounding of float32."""
    from transformers import AutoModelForCausalLM

    stock: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if hasattr(stock.model, "rotary_emb"):  # beside Megatron-Core's CPU stand-ins these buffers are unset
        stock.model.rotary_emb = type(stock.model.rotary_emb)(stock.config)
    assert len(found) == len(samples) > 0
    for recorded, sample in zip(found, samples, strict=True):
        tokens_T = torch.from_numpy(sample.tokens.astype(np.int64))
        with torch.no_grad():
            outputs = stock(tokens_T[None, :-1], output_hidden_states=True)
        assert torch.equal(recorded.tokens_T, tokens_T)
        assert recorded.prompt_length == sample.prompt_length
        mask = np.ones(sample.response_length, bool) if sample.loss_mask is None else sample.loss_mask.astype(bool)
        assert torch.equal(recorded.loss_mask_R, torch.from_numpy(mask))
        assert sorted(recorded.hidden_TD) == sorted(layers)
        for layer, hidden_TD in recorded.hidden_TD.items():
            expected_TD = outputs.hidden_states[layer + 1][0]  # the embeddings come first
            if layer == EMBEDDING:
                expected_TD = stock.get_input_embeddings().weight.detach()[
                    tokens_T[:-1]
                ]  # some models scale what they read
            torch.testing.assert_close(hidden_TD, expected_TD, rtol=1e-4, atol=1e-5, check_stride=False)
        log_probs_RV = (outputs.logits[0, sample.prompt_length - 1 :] / temperature).log_softmax(-1)
        expected_RK, tokens_RK = log_probs_RV.topk(top)
        assert torch.equal(recorded.top_tokens_RK.sort(-1).values, tokens_RK.sort(-1).values)
        torch.testing.assert_close(recorded.top_log_probs_RK, expected_RK, rtol=1e-4, atol=1e-5)

"""A small language model with the policy's tokens, to be trained as a draft.

Dims: T tokens that are read, N predicted tokens, V tokens of the vocabulary, D elements of a hidden state.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from miles.drafts.folder import read_tensors, write_draft
from miles.drafts.head_pass import head_pass
from miles.drafts.losses import chain_length, loss_at
from miles.drafts.recording import RecordedSample
from miles.drafts.trainable import PassResult
from miles.drafts.vocabulary import DraftVocabulary
from miles.services.trainer.backends.fsdp.attention import packed_attention as attention
from miles.services.trainer.backends.fsdp.attention.packed_attention import AttentionPlan
from miles.services.trainer.backends.fsdp.model.fused_norms import fuse_norms
from miles.services.trainer.backends.fsdp.model.working_weights import WorkingWeights
from miles.services.trainer.batch.packing import Segment
from miles.services.trainer.drafts.packed_tokens import pack_tokens
from miles.weights.hf_folder.model_config import read_model_config
from miles.weights.naming.model_tensors import once

_PROBE = (5, 3)
"""Tokens of the samples on which the model is tried."""


class TrainableLanguageModel:
    """Any causal language model of transformers that has the policy's tokens; implements `Trainable`.

    All samples of an optimizer step go through it in one pass, packed as the policy's own are: many short passes would
    leave a GPU waiting for the CPU. On a GPU it computes in bfloat16 with weights that are held in float32.

    Args:
        folder: The model.
        vocabulary: Tokens of the policy.
        loss: "kl" or "ce".
        steps: Drafts of a verification.
        temperature: At which the policy samples.

    Raises ValueError for a model with fewer tokens than the policy, for one that transformers names otherwise than its
    files do, as engines load it by those, and for one whose rows see others than those before them in their sample.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        vocabulary: int,
        *,
        loss: str,
        steps: int,
        device: torch.device,
        temperature: float = 1.0,
    ) -> None:
        self._folder, self._steps, self._loss = folder, steps, loss_at(loss, temperature)
        config = self._config = read_model_config(folder)
        if config.vocab_size < vocabulary:
            raise ValueError(f"{folder} has {config.vocab_size} tokens, and the policy {vocabulary}")
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        """Of the computation."""
        self._model = _load(folder, config)
        _check_packing(folder, self._model)
        self._model.to(device)
        if device.type == "cuda":
            fuse_norms(self._model)
        self._weights = WorkingWeights.of(self._model, self._dtype)
        self._head = _plain_head(self._model)
        self._tied = once(self._model.state_dict(keep_vars=True))
        stored = read_tensors(folder)
        if strange := sorted(set(self._tied) - set(stored)):
            raise ValueError(
                f"{folder} has no {', '.join(strange[:3])}, so engines could not load what is trained here"
            )
        self._vocabulary = DraftVocabulary(torch.arange(config.vocab_size), int(config.vocab_size))

    @property
    def module(self) -> torch.nn.Module:
        """The model, in evaluation mode: without dropout."""
        return self._model

    def usable(self, sample: RecordedSample) -> bool:
        """Whether it has tokens to predict from others."""
        return sample.prompt_length > 0 and bool(sample.loss_mask_R.any())

    def learn_from(self, samples: Sequence[RecordedSample]) -> PassResult:
        """Add the gradients of the mean loss over usable samples to the parameters'.

        Logits are computed and forgotten chunk by chunk: their gradient with respect to the last hidden states is kept,
        and goes through the model once.
        """
        device = next(self._model.parameters()).device
        packed = pack_tokens(samples, self._steps, device)
        with self._weights.in_use():
            plan = AttentionPlan(packed.segments, device, self._dtype)
            inputs = {"position_ids": packed.positions_T[None], "attention_plan": plan}
            if self._head is None:
                rows_ND = _logits(self._model, packed.tokens_T[None], logits_to_keep=packed.rows_N, **inputs)[0]
            else:
                rows_ND = _hidden(self._model, packed.tokens_T[None], **inputs)[0].index_select(0, packed.rows_N)
            logits_of = self._head or torch.nn.Identity()
            count = len(packed.rows_N)
            found = head_pass(logits_of, rows_ND, packed.targets, self._loss, self._vocabulary, 1 / count)
            rows_ND.backward(found.gradient_ND)  # type: ignore[no-untyped-call]
        hits_N = found.drafts_N == packed.targets.sampled_N
        agreed = (found.drafts_N == packed.targets.top_tokens_NK[:, 0]).sum()
        chains = chain_length(hits_N[packed.roots_MS.T]).sum()
        return PassResult(found.loss, count, agreed.float(), chains, len(packed.roots_MS))

    def published_name(self, parameter: str) -> str:
        """Its own name."""
        return parameter

    def save(self, folder: pathlib.Path, dtype: torch.dtype) -> None:
        """Write it as a folder that an engine can start from, in place of one that is there."""
        config = self._config.to_dict()
        tensors = {name: each.to(dtype) if each.is_floating_point() else each for name, each in self._tied.items()}
        write_draft(folder, {**config, "dtype": str(dtype).removeprefix("torch.")}, tensors, self._folder)


def _load(folder: pathlib.Path, config: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    attention.register()
    load: Any = AutoModelForCausalLM.from_pretrained
    model: torch.nn.Module = load(
        folder, config=config, dtype=torch.float32, attn_implementation=attention.PACKED_ATTENTION
    )
    return model.eval()


def _hidden(model: Any, tokens_1T: torch.Tensor, **inputs: Any) -> torch.Tensor:
    hidden_1TD: torch.Tensor = model.base_model(input_ids=tokens_1T, use_cache=False, **inputs).last_hidden_state
    return hidden_1TD


def _logits(model: Any, tokens_1T: torch.Tensor, **inputs: Any) -> torch.Tensor:
    logits_1TV: torch.Tensor = model(input_ids=tokens_1T, use_cache=False, **inputs).logits
    return logits_1TV


def _probe(model: Any, lengths: Sequence[int]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Tokens of samples of these lengths, and the other inputs of a packed pass over them."""
    device = next(model.parameters()).device
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = [Segment(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    positions_1T = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    plan = AttentionPlan(segments, device, torch.float32)
    return torch.arange(ends[-1], device=device)[None], {"position_ids": positions_1T, "attention_plan": plan}


@torch.no_grad()
def _check_packing(folder: pathlib.Path, model: Any) -> None:
    """Raise ValueError for a model in which a sample's rows depend on what is packed before them."""
    tokens_1T, inputs = _probe(model, _PROBE)
    packed_TV = _logits(model, tokens_1T, **inputs)[0]
    alone_1T = tokens_1T[:, _PROBE[0] :]
    alone_TV = _logits(model, alone_1T, **_probe(model, _PROBE[1:])[1])[0]
    if not torch.allclose(packed_TV[_PROBE[0] :], alone_TV, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{folder} is a {type(model).__name__}, whose rows depend on other samples of the same pass, so that it "
            "cannot be trained here; choose a draft model whose layers all have attention"
        )


@torch.no_grad()
def _plain_head(model: Any) -> torch.nn.Module | None:
    """The head, where logits are what it gives of the last hidden states; None for a model that scales or caps them."""
    head: torch.nn.Module | None = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    tokens_1T, inputs = _probe(model, _PROBE)
    return head if torch.equal(head(_hidden(model, tokens_1T, **inputs)), _logits(model, tokens_1T, **inputs)) else None

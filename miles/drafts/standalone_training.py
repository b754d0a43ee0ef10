"""A small language model with the policy's tokens, to be trained as a draft.

Dims: N tokens of all samples, R of them in responses, B samples of similar length, S tokens of the longest, V tokens,
D elements of a hidden state.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from miles.drafts.eagle3_training import computing_on
from miles.drafts.folder import read_tensors, write_draft
from miles.drafts.losses import LOSSES, chain_length
from miles.drafts.packed_batch import Targets
from miles.drafts.recording import RecordedSample
from miles.drafts.trainable import PassResult
from miles.drafts.unrolled_attention import PackedRows
from miles.drafts.unrolling import CHUNK
from miles.drafts.vocabulary import DraftVocabulary
from miles.weights.hf_folder.model_config import read_model_config
from miles.weights.naming.model_tensors import once


class TrainableLanguageModel:
    """Any causal language model of transformers that has the policy's tokens; implements `Trainable`.

    Args:
        folder: The model.
        vocabulary: Tokens of the policy.
        loss: "kl" or "ce".
        steps: Drafts of a verification.

    Raises ValueError for a model with fewer tokens than the policy, and for one that transformers names otherwise than
    its files do, as engines load it by those.
    """

    def __init__(self, folder: pathlib.Path, vocabulary: int, *, loss: str, steps: int, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self._folder, self._steps, self._loss = folder, steps, LOSSES[loss]
        config = self._config = read_model_config(folder)
        if config.vocab_size < vocabulary:
            raise ValueError(f"{folder} has {config.vocab_size} tokens, and the policy {vocabulary}")
        load: Any = AutoModelForCausalLM.from_pretrained
        self._model: torch.nn.Module = load(folder, config=config, dtype=torch.float32).to(device)
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

        Logits are computed and forgotten chunk by chunk, as `unrolling.learn_from` does.
        """
        device = next(self._model.parameters()).device
        lengths = [len(sample.tokens_T) for sample in samples]
        tokens_N = torch.cat([sample.tokens_T for sample in samples]).to(device)
        learnt_N = torch.cat([_predicting(sample) for sample in samples]).to(device)
        targets = Targets(
            torch.cat([sample.top_tokens_RK[sample.loss_mask_R] for sample in samples]).to(device),
            torch.cat([sample.top_log_probs_RK[sample.loss_mask_R] for sample in samples]).to(device),
            torch.cat([sample.tokens_T[sample.prompt_length :][sample.loss_mask_R] for sample in samples]).to(device),
        )
        target_N = learnt_N.cumsum(0) - 1
        hits_N = torch.zeros_like(learnt_N)
        total, agreed = torch.zeros((), device=device), torch.zeros((), device=device)
        packed, begin = PackedRows(lengths, device), 0
        for index_BS in packed.rectangles:
            places_N = packed.places_N - begin
            begin += index_BS.numel()
            rows = (learnt_N & (places_N >= 0) & (places_N < index_BS.numel())).nonzero()[:, 0]
            with computing_on(device):
                hidden_ND = self._hidden(tokens_N[index_BS]).flatten(0, 1)[places_N[rows]]
            leaf_ND = hidden_ND.detach().requires_grad_()
            for chunk in torch.split(torch.arange(len(rows), device=device), CHUNK):
                part = targets[target_N[rows[chunk]]]
                with computing_on(device):
                    logits_NV = leaf_ND[chunk] if self._head is None else self._head(leaf_ND[chunk])
                    loss = self._loss(logits_NV, part, self._vocabulary).sum() / len(targets.sampled_N)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
                drafts_N = logits_NV.detach().argmax(-1)
                hits_N[rows[chunk]] = drafts_N == part.sampled_N
                agreed += (drafts_N == part.top_tokens_NK[:, 0]).sum()
            hidden_ND.backward(leaf_ND.grad)  # type: ignore[no-untyped-call]
        chains, roots = self._chains(hits_N, learnt_N, lengths)
        return PassResult(float(total), len(targets.sampled_N), int(agreed), chains, roots)

    def published_name(self, parameter: str) -> str:
        """Its own name."""
        return parameter

    def save(self, folder: pathlib.Path, dtype: torch.dtype) -> None:
        """Write it as a folder that an engine can start from, in place of one that is there."""
        config = self._config.to_dict()
        tensors = {name: each.to(dtype) if each.is_floating_point() else each for name, each in self._tied.items()}
        write_draft(folder, {**config, "dtype": str(dtype).removeprefix("torch.")}, tensors, self._folder)

    def _hidden(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """What the head reads [B, S, D]; logits [B, S, V] of a model that does more with them."""
        if self._head is None:
            logits: torch.Tensor = self._model(input_ids=tokens_BS, use_cache=False).logits
            return logits
        return _hidden(self._model, tokens_BS)

    def _chains(self, hits_N: torch.Tensor, learnt_N: torch.Tensor, lengths: Sequence[int]) -> tuple[float, int]:
        """Tokens of the verifications that begin where `steps` learnt tokens follow, and how many do."""
        total, roots = torch.zeros((), device=hits_N.device), torch.zeros((), device=hits_N.device)
        for hits_T, learnt_T in zip(
            torch.split(hits_N, list(lengths)), torch.split(learnt_N, list(lengths)), strict=True
        ):
            if len(hits_T) >= self._steps:
                whole = learnt_T.unfold(0, self._steps, 1).all(-1)
                total += chain_length(hits_T.unfold(0, self._steps, 1)[whole].T).sum()
                roots += whole.sum()
        return float(total), int(roots)


def _hidden(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.base_model(input_ids=tokens_BS, use_cache=False).last_hidden_state
    return hidden


def _plain_head(model: Any) -> torch.nn.Module | None:
    """The head, where logits are what it gives of the last hidden states; None for a model that scales or caps them."""
    head: torch.nn.Module | None = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    tokens_BS = torch.arange(4, device=model.device)[None]
    with torch.no_grad():
        logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits
        return head if torch.equal(head(_hidden(model, tokens_BS)), logits_BSV) else None


def _predicting(sample: RecordedSample) -> torch.Tensor:
    """Tokens [T] of a sample whose logits predict a token to learn from, bool."""
    rows_T = torch.zeros(len(sample.tokens_T), dtype=torch.bool)
    rows_T[sample.prompt_length - 1 : -1] = sample.loss_mask_R
    return rows_T

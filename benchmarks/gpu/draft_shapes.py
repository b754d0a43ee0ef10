"""Draft models and recordings of given shapes, with random numbers, for `draft_learner`."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import torch

from miles.drafts import recording_files as files
from miles.drafts.eagle3_training import TrainableHead
from miles.drafts.new_head import write_new_head
from miles.drafts.recorded_layers import EMBEDDING, aux_layers
from miles.drafts.trainable import Trainable
from miles.services.trainer.drafts.language_model import TrainableLanguageModel

CHAIN = 3
"""Drafts of a verification, and unrolled steps."""
TOP_TOKENS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A draft model and its recordings."""

    kind: str
    """"standalone" or "eagle3"."""
    hidden: int
    """Of the draft, and for EAGLE-3 of the policy."""
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    draft_vocabulary: int
    batch_tokens: int
    lengths: tuple[int, int]
    """Shortest and longest sample, tokens."""
    prompt: int
    recorded_tokens: int

    @property
    def recorded_layers(self) -> tuple[int, ...]:
        """What a recording has of each token."""
        return () if self.kind == "standalone" else (EMBEDDING, *aux_layers(None, POLICY_LAYERS))


POLICY_LAYERS = 24
SMALL = Shape("standalone", 576, 1536, 30, 9, 3, 49152, 49152, 8192, (80, 240), 40, 20_000)
HEAD = Shape("eagle3", 2048, 8192, 1, 32, 8, 49152, 49152, 16384, (80, 480), 40, 32_768)
SHAPES = {
    "standalone, 135 M": SMALL,
    "EAGLE-3, 49,152 tokens": HEAD,
    "EAGLE-3, 16,384 tokens": dataclasses.replace(HEAD, draft_vocabulary=16384),
}
_TINY: dict[str, Any] = {
    "hidden": 32,
    "inner": 48,
    "heads": 4,
    "kv_heads": 2,
    "vocabulary": 128,
    "batch_tokens": 256,
    "lengths": (10, 40),
    "prompt": 5,
    "recorded_tokens": 600,
}


def tiny(shape: Shape) -> Shape:
    """The same kind, with next to no arithmetic: for a CPU."""
    part = 128 * shape.draft_vocabulary // shape.vocabulary
    return dataclasses.replace(shape, **_TINY, layers=min(shape.layers, 2), draft_vocabulary=part)


def write_model(shape: Shape, folder: pathlib.Path) -> None:
    """A folder of the draft model, from nothing."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "tie_word_embeddings": True,
        "max_position_embeddings": 4096, "dtype": "bfloat16", "bos_token_id": None, "eos_token_id": 0,
    }  # fmt: skip
    if shape.kind == "standalone":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=shape.layers))
        model.to(torch.bfloat16).save_pretrained(folder)
        return
    policy = folder / "policy"
    config: Any = LlamaConfig(**sizes, num_hidden_layers=POLICY_LAYERS, architectures=["LlamaForCausalLM"])
    config.save_pretrained(policy)
    embeddings_VD = torch.randn(shape.vocabulary, shape.hidden).bfloat16() * 0.02
    save_file({"model.embed_tokens.weight": embeddings_VD}, policy / "model.safetensors")
    write_new_head(policy, folder, draft_vocab=shape.draft_vocabulary)


def load_model(shape: Shape, folder: pathlib.Path, device: torch.device) -> Trainable:
    """It, as the draft trainer loads it."""
    if shape.kind == "standalone":
        return TrainableLanguageModel(folder, shape.vocabulary, loss="kl", steps=CHAIN, device=device)
    return TrainableHead(folder, shape.recorded_layers[1:], loss="kl", unroll_steps=CHAIN, device=device)


def write_recording(shape: Shape, root: pathlib.Path, step: int) -> None:
    """A recording of one rank, with random numbers; likeliest tokens are any, each once."""
    generator = torch.Generator().manual_seed(step)
    shortest, longest = shape.lengths
    count = 2 * shape.recorded_tokens // (shortest + longest)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    responses, top = lengths - shape.prompt, min(TOP_TOKENS, shape.vocabulary // 2)
    total = int(responses.sum())
    first = torch.randint(shape.vocabulary, (total, 1), generator=generator)
    hidden = torch.randn(int((lengths - 1).sum()), shape.hidden, generator=generator).bfloat16()
    part = files.Part(
        rows_N2=_rows(lengths - 1),
        hidden_ND={layer: hidden.roll(layer, dims=1) for layer in shape.recorded_layers},
        top_rows_M2=_rows(responses),
        top_tokens_MK=((first + torch.arange(top)) % shape.vocabulary).int(),
        top_log_probs_MK=torch.randn(total, 2 * top, generator=generator).log_softmax(-1)[:, :top],
    )
    samples = files.Samples(
        tokens_T=torch.randint(shape.vocabulary, (int(lengths.sum()),), generator=generator).int(),
        lengths_S=lengths,
        prompt_lengths_S=torch.full((count,), shape.prompt),
        loss_mask_R=torch.ones(total, dtype=torch.uint8),
    )
    files.write_part(files.partial_folder(root, step), 0, part)
    files.complete(root, files.Facts(step, shape.recorded_layers, top, (files.part_name(0),)), samples)


def _rows(lengths: torch.Tensor) -> torch.Tensor:
    """Number of the sample and place in it, int32 [N, 2]."""
    sample_N = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place_N = torch.cat([torch.arange(length) for length in lengths.tolist()])
    return torch.stack([sample_N, place_N], dim=1).int()

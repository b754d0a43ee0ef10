"""Recordings as the trainer writes them, from samples of a test's own, or of random ones."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import torch

from miles.drafts import recording_files as files
from miles.drafts.recording import RecordedSample


def random_sample(
    generator: torch.Generator,
    *,
    length: int,
    prompt: int,
    layers: Sequence[int] = (-1, 1, 3),
    hidden: int = 8,
    vocabulary: int = 50,
    top: int = 4,
) -> RecordedSample:
    """A sample with random tokens, hidden states and likeliest tokens, with the last response token masked."""
    responses = length - prompt
    logits_RV = torch.randn(responses, vocabulary, generator=generator)
    top_log_probs_RK, top_tokens_RK = logits_RV.log_softmax(-1).topk(top)
    return RecordedSample(
        tokens_T=torch.randint(vocabulary, (length,), generator=generator),
        prompt_length=prompt,
        hidden_TD={layer: torch.randn(length - 1, hidden, generator=generator) for layer in layers},
        top_tokens_RK=top_tokens_RK,
        top_log_probs_RK=top_log_probs_RK,
        loss_mask_R=torch.arange(responses) < responses - 1,
    )


def random_samples(seed: int = 0, layers: Sequence[int] = (-1, 1, 3)) -> list[RecordedSample]:
    """Three of them; one is as short as a sample can be."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((7, 3), (2, 1), (12, 11))
    return [random_sample(generator, length=length, prompt=prompt, layers=layers) for length, prompt in shapes]


def write_recording(root: pathlib.Path, step: int, samples: Sequence[RecordedSample], *, ranks: int = 1) -> None:
    """Write a complete recording; each rank has every `ranks`-th row, as with context parallelism."""
    for rank in range(ranks):
        files.write_part(files.partial_folder(root, step), rank, part_of(samples, rank, ranks))
    layers = tuple(samples[0].hidden_TD)
    names = tuple(map(files.part_name, range(ranks)))
    facts = files.Facts(step, layers, samples[0].top_tokens_RK.shape[1], names)
    files.complete(root, facts, samples_of(samples))


def samples_of(samples: Sequence[RecordedSample]) -> files.Samples:
    """What all ranks know of them."""
    return files.Samples(
        tokens_T=torch.cat([s.tokens_T for s in samples]).int(),
        lengths_S=torch.tensor([len(s.tokens_T) for s in samples]),
        prompt_lengths_S=torch.tensor([s.prompt_length for s in samples]),
        loss_mask_R=torch.cat([s.loss_mask_R for s in samples]).to(torch.uint8),
    )


def part_of(samples: Sequence[RecordedSample], rank: int, ranks: int) -> files.Part:
    """A rank's rows of them."""

    def rows(lengths: Sequence[int]) -> torch.Tensor:
        pairs = [(number, position) for number, length in enumerate(lengths) for position in range(rank, length, ranks)]
        return torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)

    own = slice(rank, None, ranks)
    return files.Part(
        rows_N2=rows([len(s.tokens_T) - 1 for s in samples]),
        hidden_ND={layer: torch.cat([s.hidden_TD[layer][own] for s in samples]) for layer in samples[0].hidden_TD},
        top_rows_M2=rows([len(s.top_tokens_RK) for s in samples]),
        top_tokens_MK=torch.cat([s.top_tokens_RK[own] for s in samples]).int(),
        top_log_probs_MK=torch.cat([s.top_log_probs_RK[own] for s in samples]),
    )

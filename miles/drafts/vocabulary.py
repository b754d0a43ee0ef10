"""The vocabulary of a draft, which may be a part of the policy's (d2t and t2d of EAGLE-3's files)."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class DraftVocabulary:
    """Tokens of the policy by those of the draft, and back.

    Args:
        ids_V: The policy's token of each of the draft's, int64 [V], ascending.
        size: Tokens of the policy.
    """

    def __init__(self, ids_V: torch.Tensor, size: int) -> None:
        self.ids_V = ids_V
        self.size = size
        self.complete = len(ids_V) == size
        """Whether it is the policy's own."""
        self._back = torch.full((size,), -1, dtype=torch.int64, device=ids_V.device)
        self._back[ids_V] = torch.arange(len(ids_V), device=ids_V.device)

    def to(self, device: torch.device) -> DraftVocabulary:
        """The same on another device."""
        return DraftVocabulary(self.ids_V.to(device), self.size)

    def draft_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """The draft's tokens for the policy's, int64; -1 for those that it has not."""
        return tokens if self.complete else self._back[tokens]

    def policy_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """The policy's tokens for the draft's, int64."""
        return tokens if self.complete else self.ids_V[tokens]

    def tensors(self) -> dict[str, torch.Tensor]:
        """d2t (differences of ids, int64 [V]) and t2d (bool [size]); none when it is complete."""
        if self.complete:
            return {}
        has = torch.zeros(self.size, dtype=torch.bool)
        has[self.ids_V.cpu()] = True
        return {"d2t": self.ids_V.cpu() - torch.arange(len(self.ids_V)), "t2d": has}


def read_vocabulary(tensors: Mapping[str, torch.Tensor], draft_size: int, size: int) -> DraftVocabulary:
    """The vocabulary of a head's folder. ValueError when d2t is missing, or not of this size."""
    if "d2t" not in tensors:
        if draft_size != size:
            raise ValueError(f"draft_vocab_size is {draft_size}, vocab_size {size}, and there is no d2t")
        return DraftVocabulary(torch.arange(size), size)
    differences = tensors["d2t"].to(torch.int64)
    if len(differences) != draft_size:
        raise ValueError(f"d2t has {len(differences)} tokens, but draft_vocab_size is {draft_size}")
    return DraftVocabulary(differences + torch.arange(draft_size), size)


def first_tokens(size: int, count: int, special: tuple[int, ...]) -> DraftVocabulary:
    """The `count` first tokens, which tokenizers learnt first as they are the most frequent, with the special ones."""
    kept = sorted(token for token in set(special) if count <= token < size)
    ids = [*range(count - len(kept)), *kept]
    return DraftVocabulary(torch.tensor(ids, dtype=torch.int64), size)

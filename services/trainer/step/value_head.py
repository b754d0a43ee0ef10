"""The critic's head: one row of weights on the final hidden state. Dims: H hidden units."""

from __future__ import annotations

import pathlib

import torch

from miles.weights.hf_folder.plain_tensors import PlainTensors

HEAD_NAME = "score.weight"
"""Its name in the sequence classifiers of Transformers."""


class ValueHead(torch.nn.Module):
    """The product with one row of weights, computed in float32 whatever the dtype of the weights and hidden states."""

    def __init__(self, weight_1H: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight_1H)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] to float32 [..., 1]."""
        return torch.nn.functional.linear(hidden.float(), self.weight.float())


def initial_weight(folder: str | pathlib.Path, hidden_size: int) -> torch.Tensor:
    """The folder's value head, float32 [1, H]; zeros where it has none.

    Zeros make the first advantages equal the returns, and are the same in every layout of ranks. Raises
    ValueError for a head of several rows.
    """
    stored = PlainTensors(folder, torch.float32)
    if HEAD_NAME not in stored:
        return torch.zeros(1, hidden_size)
    weight = stored[HEAD_NAME]
    if tuple(weight.shape) != (1, hidden_size):
        raise ValueError(
            f"{HEAD_NAME} in {folder} has shape {tuple(weight.shape)}, but a critic's head is one row of {hidden_size};"
            " set critic_load to a model with one label"
        )
    return weight.float()

"""Matrices as blocks that share a scale, and the largest magnitude of each.

Nothing is copied but views that are not contiguous, and matrices with smaller blocks at an edge. Dims: O rows, I
columns of a matrix, P and Q blocks along them.
"""

from __future__ import annotations

import torch


def as_blocks(matrix: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(..., O, I) as (..., P, height, Q, width), filled up with zeros; a matrix that is smaller is one block."""
    matrix = matrix.contiguous()
    *leading, rows, columns = matrix.shape
    height, width = _fitting(rows, height), _fitting(columns, width)
    below, beside = -rows % height, -columns % width
    if below or beside:
        matrix = torch.nn.functional.pad(matrix, (0, beside, 0, below))
    return matrix.reshape(*leading, (rows + below) // height, height, (columns + beside) // width, width)


def from_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The matrix (..., O, I) of this shape, contiguous, without what `as_blocks` has added."""
    *leading, down, height, across, width = blocks.shape
    matrix = blocks.reshape(*leading, down * height, across * width)
    return matrix[..., : shape[-2], : shape[-1]].contiguous()


def as_groups(rows: torch.Tensor, size: int) -> torch.Tensor:
    """(..., I) as (..., Q, size), filled up with zeros; rows that are shorter are one group."""
    rows, columns = rows.contiguous(), rows.shape[-1]
    size = _fitting(columns, size)
    beside = -columns % size
    if beside:
        rows = torch.nn.functional.pad(rows, (0, beside))
    return rows.reshape(*rows.shape[:-1], (columns + beside) // size, size)


def from_groups(groups: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The rows (..., I) of this shape, contiguous, without what `as_groups` has added."""
    *leading, across, size = groups.shape
    return groups.reshape(*leading, across * size)[..., : shape[-1]].contiguous()


def count(size: int, block: int) -> int:
    """How many blocks a dimension has."""
    return -(-size // block)


def largest_of_groups(groups: torch.Tensor) -> torch.Tensor:
    """Largest magnitudes of (..., Q, size), as (..., Q, 1). NaN where there is one."""
    return groups.abs().amax(-1, keepdim=True)


def largest_of_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitudes of (..., P, height, Q, width), as (..., P, 1, Q, 1). NaN where there is one."""
    return largest_of_groups(blocks).amax(-3, keepdim=True)


def _fitting(size: int, block: int) -> int:
    return min(block, size) or 1

"""Host memory besides processes' own: versions of the weights, buckets."""

from __future__ import annotations

from miles.memory.amount import Part
from miles.memory.run import Run

_PROCESS = {"cpu": 400 << 20, "cuda": 4 << 30}
"""Resident memory of a Python process with PyTorch by itself: on GPUs CUDA's libraries and pinned buffers besides."""
_CONTEXT = int(1.5 * (1 << 30))
"""On a GPU: CUDA's context, kernels' code and NCCL's buffers of one process."""


def versions_part(run: Run) -> Part:
    """Return what versions of the weights take in shared memory of a node: the one that is served and the next one."""
    weights = run.published
    return Part("versions of the weights", 2 * weights.bytes, f"2 versions × ({weights.formula})")


def compared_parts(run: Run, rank: int) -> list[Part]:
    """Return what a trainer rank keeps of the last version where changes to it are sent: rank 0 all of it.

    Each of several ranks keeps its shards besides.
    """
    if run.settings.update_weight_transfer_mode not in ("disk_delta", "grpc_chunks"):
        return []
    count, words = run.published.bytes, f"({run.published.formula})"
    shards = -(-count // run.ranks) if run.ranks > 1 else 0
    formula = " + ".join([*([words] if rank == 0 else []), *([f"{words} / {run.ranks} ranks"] if shards else [])])
    return [Part("last version", (count if rank == 0 else 0) + shards, formula)]


def buckets_part(run: Run) -> Part:
    """Return the buckets in which a rank all-gathers weights to publish them."""
    each = run.settings.update_weight_buffer_size
    return Part("buckets of weights", min(2 * each, 2 * run.published.bytes), f"2 × update_weight_buffer_size = {each}")


def process_part(device: str) -> Part:
    """Return what a Python process with PyTorch takes by itself, in host memory."""
    kind = "cpu" if device == "cpu" else "cuda"
    libraries = "Python and PyTorch" if kind == "cpu" else "Python, PyTorch, CUDA's libraries and pinned buffers"
    return Part("process", _PROCESS[kind], f"an allowance for {libraries}")


def context_part() -> Part:
    """Return what a process takes on a GPU by itself."""
    return Part("CUDA context", _CONTEXT, "an allowance for the context, kernels and NCCL's buffers")

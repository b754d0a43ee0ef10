"""Weights as safetensors files, for servers that read updates from a folder."""

from __future__ import annotations

import asyncio
import pathlib
import shutil
from collections.abc import Sequence

from miles.services.rollout.engines.sglang.weights.buckets import NamedTensor


async def write_files(folder: pathlib.Path, parts: Sequence[Sequence[NamedTensor]]) -> None:
    """Write each bucket as one safetensors file of a new folder."""
    await asyncio.to_thread(_write_files, folder, parts)


def _write_files(folder: pathlib.Path, parts: Sequence[Sequence[NamedTensor]]) -> None:
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, part in enumerate(parts):
        # Clones: parts of one fused tensor share their memory, which the format does not support.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in part}
        save_file(tensors, folder / f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors")

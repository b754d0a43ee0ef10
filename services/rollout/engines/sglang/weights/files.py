"""Weights as safetensors files, for servers that read updates from a folder."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence

from miles.services.rollout.engines.sglang.weights.buckets import NamedTensor


@contextlib.asynccontextmanager
async def written(
    root: pathlib.Path | None, prefix: str, name: str, parts: Sequence[Sequence[NamedTensor]]
) -> AsyncIterator[pathlib.Path]:
    """A folder of this name, in a new one of `root`, with a safetensors file for each bucket; removed at the end."""
    above = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        await asyncio.to_thread(_write_files, above / name, parts)
        yield above / name
    finally:
        await asyncio.to_thread(shutil.rmtree, above, ignore_errors=True)


def _write_files(folder: pathlib.Path, parts: Sequence[Sequence[NamedTensor]]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    for i, part in enumerate(parts):
        # Clones: parts of one fused tensor share their memory, which the format does not support.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in part}
        save_file(tensors, folder / f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors")

"""Tensors written, as they come, to a Hugging Face folder's safetensors files of bounded size."""

from __future__ import annotations

import json
import pathlib

import torch

SHARD_BYTES = 5 * 10**9
"""Bytes of weights per file."""


class ShardWriter:
    """Writes tensors, as they come, to a folder's safetensors files and their index."""

    def __init__(self, directory: pathlib.Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, with the next file that is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._write()
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += size
        self._total += size

    def finish(self) -> None:
        """Write what is left, and give the files their names."""
        self._write()
        count = len(self._files)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        weight_map: dict[str, str] = {}
        for i, (file, tensors) in enumerate(zip(names, self._files, strict=True)):
            (self._directory / f"part-{i}").rename(self._directory / file)
            weight_map |= dict.fromkeys(tensors, file)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))

    def _write(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self._directory / f"part-{len(self._files)}", metadata={"format": "pt"})
        self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

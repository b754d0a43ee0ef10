"""A Hugging Face checkpoint written from tensors that come one at a time, in files of bounded size."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterable

import torch
import torch.distributed as dist

from miles.ownership import owner_file
from miles.weights.naming.model_tensors import ModelTensors, shared_by_mtp

SHARD_BYTES = 5 * 10**9
"""Bytes of weights per file."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json")


def write_hf_checkpoint(
    directory: pathlib.Path,
    source: pathlib.Path,
    model: ModelTensors,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` beside copies of `source`'s config and tokenizer to a new folder; collective, rank 0 writes.

    `tensors` are those of `model`, which `source` holds too, in the checkpoint form and of weights in `dtype`. What
    `source` has beyond them, e.g. MTP layers that the trainer left out, is copied in that type.
    """
    copies = _copies(source, model)
    writer = _Writer(directory, shard_bytes) if dist.get_rank() == 0 else None
    if writer is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name != owner_file.NAME:
                shutil.copyfile(path, directory / path.name)
        _set_dtype(directory / "config.json", dtype)
    for name, tensor in tensors:  # gathering is collective
        if writer is not None:
            writer.add(name, tensor)
            for copy in copies.get(name, ()):
                writer.add(copy, tensor)
    if writer is not None:
        for name, tensor in _kept(source, {*writer.names, *model.module, *model.aliases}):
            writer.add(name, tensor.to(model.exported_dtype(name, tensor.dtype, dtype)))
        writer.finish()
    dist.barrier()


class _Writer:
    def __init__(self, directory: pathlib.Path, shard_bytes: int) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total = 0

    @property
    def names(self) -> set[str]:
        """Names of everything added so far."""
        return {name for names in self._files for name in names} | set(self._pending)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._write()
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += size
        self._total += size

    def finish(self) -> None:
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


def _set_dtype(path: pathlib.Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2))


def _copies(source: pathlib.Path, model: ModelTensors) -> dict[str, list[str]]:
    """By name, other names of the same tensor in the source."""
    found: dict[str, list[str]] = {}
    for name in _names(source):
        original = shared_by_mtp(name)
        if original is not None:
            found.setdefault(model.aliases.get(original, original), []).append(name)
    return found


def _names(source: pathlib.Path) -> Iterable[str]:
    from safetensors import safe_open

    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def _kept(source: pathlib.Path, known: set[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors of the source's files beyond those known: written, or the model's under other names."""
    from safetensors import safe_open

    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name not in known:
                    yield name, file.get_tensor(name)

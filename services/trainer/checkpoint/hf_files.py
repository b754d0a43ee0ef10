"""A Hugging Face checkpoint written from tensors that come one at a time, in files of bounded size."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from miles.ownership import owner_file
from miles.services.trainer.checkpoint.errors import cause_of
from miles.weights.naming.model_tensors import ModelTensors, shared_by_mtp

SHARD_BYTES = 5 * 10**9
"""Bytes of weights per file."""
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json"),
    *(".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot"),
)
_IN_FOLDERS = (".py", ".jinja")
"""What is copied of a source's folders: code and chat templates."""
_TEMPLATE_FILE = "chat_template.jinja"


def write_hf_checkpoint(
    directory: pathlib.Path,
    source: pathlib.Path,
    model: ModelTensors,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    *,
    chat_template: pathlib.Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` beside copies of `source`'s config and tokenizer to a new folder; collective, rank 0 writes.

    `tensors` are those of `model`, which `source` holds too, in the checkpoint form and of weights in `dtype`. What
    `source` has beyond them, e.g. MTP layers that the trainer left out, is copied in that type. `chat_template`, a
    Jinja file, takes the place of the source's.

    Raises OSError on every rank when rank 0 could not write.
    """
    writing = _Writing(directory, source, model, dtype, shard_bytes) if dist.get_rank() == 0 else None
    if writing is not None:
        writing.attempt(lambda: writing.copy_files(chat_template))
    for name, tensor in tensors:  # gathering is collective, so it goes on when rank 0 has failed
        if writing is not None:
            writing.attempt(lambda name=name, tensor=tensor: writing.add(name, tensor))  # type: ignore[misc]
    if writing is not None:
        writing.attempt(writing.finish)
    outcome = [None if writing is None or writing.error is None else cause_of(writing.error)]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise (writing.error if writing is not None else None) or OSError(f"rank 0: {outcome[0]}")


class _Writing:
    """Rank 0's part of writing an export; after its first error it does nothing more."""

    def __init__(
        self,
        directory: pathlib.Path,
        source: pathlib.Path,
        model: ModelTensors,
        dtype: torch.dtype,
        shard_bytes: int,
    ) -> None:
        self._directory = directory
        self._source = source
        self._model = model
        self._dtype = dtype
        self._copies: dict[str, list[str]] = {}
        self._writer = ShardWriter(directory, shard_bytes)
        self.error: Exception | None = None

    def attempt(self, write: Callable[[], None]) -> None:
        """Do a part of it, unless an earlier part has failed."""
        if self.error is None:
            try:
                write()
            except Exception as error:  # raised on every rank once the others have come to the end
                self.error = error

    def copy_files(self, chat_template: pathlib.Path | None) -> None:
        """Copy everything that is no weight, and set what training has set."""
        self._copies = _copies(self._source, self._model)
        self._directory.mkdir(parents=True, exist_ok=True)
        copy_other_files(self._source, self._directory)
        set_dtype(self._directory / "config.json", self._dtype)
        if chat_template is not None:
            set_chat_template(self._directory, chat_template)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, under each of its names."""
        self._writer.add(name, tensor)
        for copy in self._copies.get(name, ()):
            self._writer.add(copy, tensor)

    def finish(self) -> None:
        """Write what the source has beyond the tensors, and name the files."""
        for name, tensor in _kept(self._source, {*self._writer.names, *self._model.module, *self._model.aliases}):
            self._writer.add(name, tensor.to(self._model.exported_dtype(name, tensor.dtype, self._dtype)))
        self._writer.finish()


class ShardWriter:
    """Writes tensors, as they come, to a folder's safetensors files and their index."""

    def __init__(self, directory: pathlib.Path, shard_bytes: int = SHARD_BYTES) -> None:
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


def set_dtype(path: pathlib.Path, dtype: torch.dtype) -> None:
    """Say in a config.json, and in the configurations of parts in it, that weights have this type.

    Under the name that it has there: older readers know `torch_dtype` alone.
    """
    config, name = json.loads(path.read_text()), str(dtype).removeprefix("torch.")
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    if "torch_dtype" not in config:
        config["dtype"] = name
    path.write_text(json.dumps(config, indent=2))


def set_chat_template(folder: pathlib.Path, template: pathlib.Path) -> None:
    """Make a Jinja file the chat template of the tokenizer in a folder, in place of any other."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        config = json.loads(settings.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            settings.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(template.expanduser(), folder / _TEMPLATE_FILE)


def copy_other_files(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copy everything of a model's folder that is no weight: configuration, tokenizer, code."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name != owner_file.NAME:
            shutil.copyfile(path, directory / path.name)
        elif path.is_dir() and not path.name.startswith("."):
            _copy_code(path, directory / path.name)


def _copy_code(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a folder's code and templates, with the folders below it."""
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(source).parts)
        if path.is_file() and path.suffix in _IN_FOLDERS and not hidden:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


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

"""A Hugging Face checkpoint written from tensors that come one at a time, in files of bounded size."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from miles.ownership import owner_file
from miles.precision.quantization_config import QUANTISED_BY
from miles.precision.recipe import Recipe
from miles.services.trainer.checkpoint.errors import cause_of
from miles.services.trainer.checkpoint.quantised_files import QuantisingWriter, refuse_unfit
from miles.services.trainer.checkpoint.shard_writer import SHARD_BYTES, ShardWriter
from miles.weights.hf_folder.plain_tensors import PlainTensors
from miles.weights.naming.model_tensors import ModelTensors, shared_by_mtp

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
    recipe: Recipe | None = None,
    chat_template: pathlib.Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` beside copies of `source`'s config and tokenizer to a new folder; collective, rank 0 writes.

    `tensors` are those of `model`, which `source` holds too, in the checkpoint form and of weights in `dtype`. What
    `source` has beyond them, e.g. MTP layers that the trainer left out, is copied in that type. With a `recipe` the
    matrices that it covers are quantised from `dtype`, those copied too, unless `source` holds them by the same one.
    `chat_template`, a Jinja file, takes the place of the source's.

    Raises OSError on every rank when rank 0 could not write.
    """
    writing = _Writing(directory, source, model, dtype, recipe, shard_bytes) if dist.get_rank() == 0 else None
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
        recipe: Recipe | None,
        shard_bytes: int,
    ) -> None:
        self._directory = directory
        self._source = source
        self._model = model
        self._dtype = dtype
        self._recipe = recipe
        self._shapes = {**model.conversion.checkpoint_shapes(model.module), **model.mtp}
        self._copies: dict[str, list[str]] = {}
        self._added: set[str] = set()
        self._writer = (
            ShardWriter(directory, shard_bytes)
            if recipe is None
            else QuantisingWriter(directory, recipe, self._shapes, shard_bytes)
        )
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
        if self._recipe is not None:
            refuse_unfit(self._recipe, self._shapes)
        self._copies = _copies(self._source, self._model)
        self._directory.mkdir(parents=True, exist_ok=True)
        copy_other_files(self._source, self._directory)
        set_dtype(self._directory / "config.json", self._dtype)
        state_plain_weights(self._directory / "config.json")
        if chat_template is not None:
            set_chat_template(self._directory, chat_template)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, under each of its names."""
        for each in (name, *self._copies.get(name, ())):
            self._added.add(each)
            self._writer.add(each, tensor)

    def finish(self) -> None:
        """Write what the source has beyond the tensors, and name the files."""
        known = {*self._added, *self._model.module, *self._model.aliases}
        stored = PlainTensors(self._source, self._dtype)
        for name in stored:
            if name in known:  # written, or the model's under another name
                continue
            if (
                isinstance(self._writer, QuantisingWriter)
                and stored.recipe == self._recipe
                and stored.is_quantised(name)
            ):
                self._writer.add_parts(name, stored.parts(name))
            else:
                tensor = stored[name]
                self._writer.add(name, tensor.to(self._model.exported_dtype(name, tensor.dtype, self._dtype)))
        self._writer.finish()


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


def state_plain_weights(path: pathlib.Path) -> None:
    """Say in a config.json that weights are not quantised."""
    config = json.loads(path.read_text())
    plain = {key: value for key, value in config.items() if key not in QUANTISED_BY}
    if plain != config:
        path.write_text(json.dumps(plain, indent=2))


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
    for name in PlainTensors(source, torch.float32):
        original = shared_by_mtp(name)
        if original is not None:
            found.setdefault(model.aliases.get(original, original), []).append(name)
    return found

"""The tensors of a Hugging Face folder by name, each read and dequantised when it is asked for."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from miles.config.checks.json_file import read_json_object
from miles.precision.base import WeightFormat
from miles.precision.fp8_block import SCALE_SUFFIX
from miles.precision.int4 import PACKED_SUFFIX, SHAPE_SUFFIX
from miles.precision.quantization_config import recipe_of
from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.weights.base import WeightsRefused

_MARKS = (PACKED_SUFFIX, SCALE_SUFFIX, "_zero_point", "_g_idx")
"""Ends of names that only parts of quantised matrices have."""


class PlainTensors(Mapping[str, torch.Tensor]):
    """What safetensors files hold: names and order are those of the files; parts of a matrix are one tensor.

    Nothing is kept in memory. May be read by several threads.

    Args:
        folder: With config.json, which says how weights are quantised.
        dtype: Type of dequantised matrices; other tensors have the type that they are stored in.

    Raises UnknownQuantisation (a ValueError) for weights in a format that there is no recipe for, and WeightsRefused
    for matrices of which parts are missing, and for parts that the format does not have.
    """

    def __init__(self, folder: str | pathlib.Path, dtype: torch.dtype) -> None:
        from safetensors import safe_open

        self.folder, self.dtype = pathlib.Path(folder), dtype
        self.recipe: Recipe | None = recipe_of(read_json_object(self.folder / "config.json"))
        """By which the folder holds its matrices; None when they are not quantised."""
        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(self.folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (not a dict)
        self._codec = None if self.recipe is None else weight_format(self.recipe)
        self._suffixes = self._suffixes_of_parts()
        self._refuse_other_parts()
        self._quantised = self._find_quantised()
        parts = {name + suffix: name for name in self._quantised for suffix in self._suffixes}
        self._names = dict.fromkeys(parts.get(stored, stored) for stored in self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor. Raises WeightsRefused for parts that do not fit each other."""
        if name not in self._names:
            raise KeyError(name)
        if name not in self._quantised:
            return self._read(name)
        parts = self.parts(name)
        assert self._codec is not None, "there is no recipe without a format"
        self._check(name, self._codec, parts)
        return self._codec.dequantise(parts, self.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def is_quantised(self, name: str) -> bool:
        """Whether the tensor of this name is a matrix that the folder holds as parts."""
        return name in self._quantised

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """The stored tensors of one name by suffix: the parts of a matrix, or the tensor by itself."""
        return {suffix: self._read(name + suffix) for suffix in (self._suffixes if name in self._quantised else ("",))}

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def _suffixes_of_parts(self) -> tuple[str, ...]:
        if self._codec is None:
            return ()
        return tuple(suffix for suffix, _, _ in self._codec.parts(torch.bfloat16, (128, 128)))

    def _refuse_other_parts(self) -> None:
        """A model is not to be made from what is left: readers give matrices without values random ones."""
        marks = tuple(mark for mark in _MARKS if mark not in self._suffixes)
        found = [stored for stored in self._files if stored.endswith(marks)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            said = "no quantization_config" if self.recipe is None else f"{self.recipe.format} without such parts"
            raise WeightsRefused(f"{self.folder} holds {found[0]}{more}, of a quantised matrix, and says {said}")

    def _find_quantised(self) -> frozenset[str]:
        """Names of the matrices that are held as parts, by the one part that no other tensor's name ends like."""
        mark = next((suffix for suffix in self._suffixes if suffix), None)
        ends = [] if mark is None else [stored for stored in self._files if stored.endswith(mark)]
        found = frozenset(stored.removesuffix(str(mark)) for stored in ends)
        missing = [name + suffix for name in sorted(found) for suffix in self._suffixes]
        missing = [name for name in missing if name not in self._files]
        missing += [f"scales of {stored}" for stored in self._files if stored not in found and self._is_fp8(stored)]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise WeightsRefused(f"{self.folder} lacks parts of quantised matrices: {', '.join(missing[:5])}{more}")
        return found

    def _is_fp8(self, stored: str) -> bool:
        """Whether a tensor is of a type that means nothing without scales."""
        return str(self._files[stored].get_slice(stored).get_dtype()) == "F8_E4M3"

    def _check(self, name: str, codec: WeightFormat, parts: Mapping[str, torch.Tensor]) -> None:
        """Refuse parts whose shapes are not those of one matrix."""
        shape = _shape(parts)
        problem = codec.why_not(shape)
        expected = () if problem else codec.parts(self.dtype, shape)
        wrong = [
            f"{name}{suffix} has shape {tuple(parts[suffix].shape)} instead of {size}"
            for suffix, _, size in expected
            if tuple(parts[suffix].shape) != size
        ]
        if problem or wrong:
            raise WeightsRefused(f"{self.folder}: {problem or '; '.join(wrong)} (a matrix {name} of {shape})")


def _shape(parts: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Of the matrix that parts stand for: that of its values, unless several are packed into one number."""
    if "" in parts:
        return tuple(parts[""].shape)
    return (*parts[PACKED_SUFFIX].shape[:-2], *map(int, parts[SHAPE_SUFFIX].tolist()))

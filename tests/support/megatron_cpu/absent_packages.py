"""Stand-ins for Triton and TransformerEngine, which megatron-core and megatron-bridge import but CPU tests never call.

megatron-core looks whether TransformerEngine is there and does without; megatron-bridge needs the names alone. So
`install_triton` comes before megatron.core, and `install_transformer_engine` after it and before megatron.bridge.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch


class _Anything:
    """Can be called, indexed, used as a decorator and asked for any attribute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __lt__(self, other: Any) -> bool:
        return False

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __mul__ = __rmul__ = __or__


class _ClassOfClasses(type):
    """A class that has any class as an attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ClassOfClasses(name, (_AnyModule,), {})


class _AnyModule(torch.nn.Module, metaclass=_ClassOfClasses):
    pass


class _StandIn(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012  (what makes a module a package)
    __version__ = "3.4.0"
    make: Callable[[str], Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(self).make(name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str, make: Callable[[str], Any]) -> None:
        self._package = package
        self._module = type("StandIn", (_StandIn,), {"make": staticmethod(make)})

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] == self._package:
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self._module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _any_class(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _ClassOfClasses(name, (_AnyModule,), {})


def install_triton() -> None:
    """Let `import triton` succeed where it is not installed."""
    if importlib.machinery.PathFinder.find_spec("triton") is None:
        sys.meta_path.append(_Finder("triton", lambda name: _Anything()))


def install_transformer_engine() -> None:
    """Let megatron-bridge import TransformerEngine's names; megatron-core has already decided to do without."""
    import megatron.core.extensions.transformer_engine as extension

    if extension.HAVE_TE:
        raise RuntimeError("TransformerEngine is installed; its stand-in is for machines without it")
    sys.meta_path.insert(0, _Finder("transformer_engine", _any_class))
    extension.__getattr__ = _any_class  # type: ignore[attr-defined]

"""Prepares each process of SGLang's test installation to run without a GPU, when it imports what needs it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _before_torchvision() -> None:
    import torch

    # Without CUDA, torchvision's library of operators does not load, and what torchvision registers for these fails.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_args, **_kwargs: None  # checksums of weights synchronise in any case


def _after_host_pools(module: ModuleType) -> None:
    import torch

    def allocate(dims: Any, dtype: Any, device: Any, *_args: Any, **_kwargs: Any) -> Any:
        return torch.empty(dims, dtype=dtype, device=device)

    module.ALLOC_MEMORY_FUNCS["cpu"] = allocate  # pinning memory takes a GPU's driver


def _after_latent_attention(module: ModuleType) -> None:
    def absorbed(_attention: Any, _batch: Any) -> Any:
        return module.AttnForwardMethod.MLA

    # Plain attention reads keys and values from the cache, which holds latent ones; others prefill with full ones.
    module.AttentionBackendRegistry.register("torch_native", absorbed)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _before_torchvision()
            sys.meta_path.insert(0, _AfterImports())
        return None


class _AfterImports(importlib.abc.MetaPathFinder):
    """Calls what `_AFTER` has for a module once the module is imported."""

    def __init__(self) -> None:
        self._left = dict(_AFTER)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        after = self._left.pop(fullname, None)
        if after is None:
            return None
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        run: Any = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            after(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_AFTER: Mapping[str, Callable[[ModuleType], None]] = {
    "sglang.srt.mem_cache.pool_host.common": _after_host_pools,
    "sglang.srt.models.deepseek_common.attention_backend_handler": _after_latent_attention,
}
sys.meta_path.insert(0, _Finder())

"""PyTorch's CUDA calls answered by the CPU, so that megatron-core runs without a GPU. For tests alone; import it first.

megatron-core allocates on `torch.cuda.current_device()`, orders work by streams and reads CUDA's random state. With one
thread of execution all of that has a trivial meaning, which is given here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import typing
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron-core compiles small functions, which needs a C++ compiler

import torch
import typing_extensions

CPU = torch.device("cpu")
_FACTORIES = (  # noqa: SIM905
    "tensor zeros ones empty full arange rand randn randint eye linspace zeros_like ones_like empty_like "
    "full_like rand_like randn_like as_tensor randperm"
).split()


class Stream:
    """A stream whose work is always done."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> bool:
        return False

    def record_event(self, *args: Any) -> Event:
        return Event()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, -1)


class Event(Stream):
    """An event that has happened."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


def install() -> None:
    """Put the stand-ins in place."""
    if torch.cuda.is_available():
        raise RuntimeError("these stand-ins are for machines without a GPU")
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override  # Python 3.11 lacks what megatron-core imports
    _replace_cuda_module()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _replace_tensor_methods()


def _replace_cuda_module() -> None:
    cuda: Any = torch.cuda
    stream = Stream()
    cuda.current_device = lambda: CPU
    for name in ("synchronize", "set_device"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: stream)
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.Stream, cuda.Event = Stream, Event
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_capability = lambda *args, **kwargs: (0, 0)
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)


class HostTensor(torch.Tensor):
    """What megatron-core's offloading optimizer copied to host memory; it takes everything else to be on a GPU."""


def _asked_by_offloading() -> bool:
    return "hybrid_optimizer" in sys._getframe(2).f_code.co_filename


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return wrapped


def _replace_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    for name in ("cuda", "pin_memory"):
        setattr(tensor, name, lambda self, *args, **kwargs: self)
    tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    original_to, original_type = tensor.to, tensor.type

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str | torch.device) and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        """megatron-core sorts parameters by names such as torch.cuda.FloatTensor."""
        result = original_type(self, *args, **kwargs)
        asked = not args and not kwargs and str(result).startswith("torch.")
        if asked and "megatron" in sys._getframe(1).f_code.co_filename:
            return result.replace("torch.", "torch.cuda.")
        return result

    original_cpu = tensor.cpu

    def cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original_cpu(self, *args, **kwargs)
        return result.as_subclass(HostTensor) if _asked_by_offloading() else result

    def is_cuda(self: Any) -> bool:
        return _asked_by_offloading() and not isinstance(self, HostTensor)

    tensor.to, tensor.type, tensor.cpu = to, type_, cpu
    tensor.is_cuda = property(is_cuda)


install()

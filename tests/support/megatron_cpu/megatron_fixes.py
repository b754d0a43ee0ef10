"""Places in megatron-core 0.19.2 that hold on GPUs alone, set right for the CPU. For tests alone."""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Put the fixes in place; needs `cuda_stand_ins`."""
    _expert_splits()
    _adam_without_fused_kernels()


def _expert_splits() -> None:
    """The splits of an all-to-all must be numbers; the original converts them only when they are on a GPU."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def to_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_numbers


def _adam_without_fused_kernels() -> None:
    """The distributed optimizer knows the state of fused Adam; PyTorch's has a `step` tensor for each parameter."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original_set = DistributedOptimizer._set_main_param_and_optimizer_states
    original_load = DistributedOptimizer.load_state_dict

    def set_states(self: Any, parameter: Any, tensors: dict[str, Any]) -> Any:
        tensors.setdefault("step", None)
        return original_set(self, parameter, tensors)

    def load(self: Any, state: Any) -> Any:
        result = original_load(self, state)
        for each in self.optimizer.state.values():
            if torch.is_tensor(each.get("step")):
                each["step"] = each["step"].clone()  # loaded as one tensor for all, which would advance too fast
        return result

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.load_state_dict = load

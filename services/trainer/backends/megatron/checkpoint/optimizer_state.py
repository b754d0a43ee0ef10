"""The optimizer's state in a checkpoint: saved from any of Megatron-Core's optimizers, restored into any other.

An optimizer has one part, or two where experts are spread over ranks: the rest and the experts. Tensors are
matched by global names. Everything else is saved by part; of that, only the number of steps and the loss scale, the
same in all parts, are restored. The rest comes from the configuration of the resumed run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""The layout of the state, for Megatron-Core."""


def sharded_state(optimizer: Any, model: Mapping[str, Any], *, loading: bool) -> dict[Any, Any]:
    """The state as tensors to save or to load into; `model` has the sharded parameters; collective."""
    for part in _parts(optimizer):
        _make_state(part)
    state: dict[Any, Any] = optimizer.sharded_state_dict(dict(model), is_loading=loading, metadata=CONTENT)
    return state


def master_prefix(optimizer: Any) -> str:
    """Prefix of the names of float32 parameters; empty where those are the model's own."""
    part = _parts(optimizer)[0]
    if _is_32_bit(part):
        return ""
    return "optimizer.state.param." if _is_distributed(part) else "optimizer.state.fp32_param."


def rename(state: dict[Any, Any], old: str, new: str) -> None:
    """Look for tensors whose names begin with `old` under names that begin with `new`; changes `state`."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for value in nested_values(state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and old and value.key.startswith(old):
            value.key = new + value.key.removeprefix(old)


def restore(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Restore an optimizer from what was loaded into `sharded_state`."""
    parts = _parts(optimizer)
    saved = [loaded, *(part for key, part in loaded.items() if isinstance(key, int))]
    step = next((step for part in saved if (step := _step(part)) is not None), 0.0)
    scaler = next((part["grad_scaler"] for part in saved if "grad_scaler" in part), None)
    for index, part in enumerate(parts):
        state = loaded if len(parts) == 1 else loaded[index]
        groups = part.optimizer.state_dict()["param_groups"]
        if step and not _steps_are_in_states(part.optimizer):
            groups = [{**group, "step": int(step)} for group in groups]
        rest = {} if scaler is None else {"grad_scaler": scaler}
        if _is_hybrid(part):
            _restore_hybrid(part, state["param_state"], step, rest)
        elif part.config.use_precision_aware_optimizer:
            part.load_parameter_state_from_fully_reshardable(state["param_state"])
            _count_steps(part.optimizer, step)
            _restore_scale(part, rest)
        elif _is_distributed(part):
            _restore_distributed(part, state["param_state"], groups, step, rest)
        else:
            _restore_unsharded(part, state, groups, step, rest)


def _restore_distributed(part: Any, tensors: Any, groups: list[dict[str, Any]], step: float, rest: Any) -> None:
    if _steps_are_in_states(part.optimizer):
        groups = [{**group, "step": step} for group in groups]
    part.load_state_dict({"optimizer": {"param_groups": groups}, **rest})
    states = part.optimizer.state.values()
    for state in states:
        state.pop("step", None)  # the next call does not expect it
    part.load_parameter_state_from_fully_reshardable(tensors)
    if _steps_are_in_states(part.optimizer):
        for state in states:
            state["step"] = torch.tensor(step)


def _restore_hybrid(part: Any, tensors: Any, step: float, rest: Mapping[str, Any]) -> None:
    """Restore an optimizer whose parameters are updated on two devices.

    Its own `load_state_dict` would take a step with random gradients first, and leave the parameters changed.
    """
    hybrid = part.optimizer
    own = {parameter: dict(state) for parameter, state in hybrid.state.items()}
    part.load_parameter_state_from_fully_reshardable(tensors)  # puts what was read in the place of its own tensors
    read = {parameter: dict(state) for parameter, state in hybrid.state.items()}
    for parameter, state in own.items():
        for name in ("master_param", "exp_avg", "exp_avg_sq"):
            state[name].data.copy_(read[parameter][name])
        if "step" in state:
            state["step"] = torch.tensor(step)
    for each in hybrid.sub_optimizers:
        for group in each.param_groups:
            for parameter in group["params"]:
                each.state[parameter] = own[hybrid.inner_param_to_orig_param[parameter]]
        if not _steps_are_in_states(each):
            _count_steps(each, step)
    hybrid._sync_sub_optimizers_state_to_hdo()
    _restore_scale(part, rest)


def _count_steps(fused: Any, step: float) -> None:
    for group in fused.param_groups:
        group["step"] = int(step)


def _restore_scale(part: Any, rest: Mapping[str, Any]) -> None:
    if rest and part.grad_scaler:
        part.grad_scaler.load_state_dict(rest["grad_scaler"])


def _restore_unsharded(
    part: Any, state: Mapping[Any, Any], groups: list[dict[str, Any]], step: float, rest: Any
) -> None:
    loaded = state["state"] if _is_32_bit(part) else state["optimizer"]["state"]
    states = {key: dict(tensors) for key, tensors in loaded.items() if isinstance(key, int)}
    if _steps_are_in_states(part.optimizer):
        for tensors in states.values():
            tensors["step"] = torch.tensor(step)
    inner = {"param_groups": groups, "state": states}
    if _is_32_bit(part):
        part.load_state_dict(inner)
    else:
        masters = state["fp32_from_fp16_params"]
        part.load_state_dict({"optimizer": inner, "fp32_from_fp16_params": masters, **rest})


def _parts(optimizer: Any) -> list[Any]:
    parts: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts


def _is_distributed(part: Any) -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(part, DistributedOptimizer)


def _is_32_bit(part: Any) -> bool:
    """Whether it updates the model's own parameters."""
    from megatron.core.optimizer.optimizer import FP32Optimizer

    return isinstance(part, FP32Optimizer)


def _is_hybrid(part: Any) -> bool:
    """Whether a share of the parameters, or all, is updated on the CPU."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    return isinstance(part.optimizer, HybridDeviceOptimizer)


def _steps_are_in_states(inner: Any) -> bool:
    """PyTorch's Adam counts steps for each parameter, fused ones for each group."""
    return isinstance(inner, torch.optim.Adam)


def _make_state(part: Any) -> None:
    """Make the state that Adam would make in its first step, so that a checkpoint can be read into it."""
    if _is_hybrid(part):
        for each in part.optimizer.sub_optimizers:
            _make_moments(each)
        part.optimizer._sync_sub_optimizers_state_to_hdo()
    elif part.config.use_precision_aware_optimizer:
        _make_own_masters(part.optimizer)
    else:
        _make_moments(part.optimizer)


def _make_own_masters(fused: Any) -> None:
    for group in fused.param_groups:
        for parameter in group["params"]:
            if not fused.state[parameter]:
                fused.initialize_state(parameter, False)  # whole masters, as in other optimizers' checkpoints


def _make_moments(inner: Any) -> None:
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                step = {"step": torch.tensor(0.0)} if _steps_are_in_states(inner) else {}
                zeros = torch.zeros_like(parameter.data)
                inner.state[parameter].update(**step, exp_avg=zeros, exp_avg_sq=zeros.clone())


def _step(part: Mapping[Any, Any]) -> float | None:
    """Steps taken, from wherever the kind of optimizer keeps them; None where it does not."""
    inner = part.get("optimizer", part)
    counts = [inner.get("state", {}).get("common_step"), *(g.get("step") for g in inner.get("param_groups", ()))]
    return next((float(count) for count in counts if count is not None), None)

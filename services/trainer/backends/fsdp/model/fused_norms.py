"""RMS norms as one operation each, forward and backward, for GPUs that wait for the CPU to start kernels."""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm

_PROBE_ROWS = 4


class FusedRMSNorm(torch.nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019), rounded once."""

    def __init__(self, weight: torch.nn.Parameter, eps: float) -> None:
        """`weight` is shared, not copied."""
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of [..., D], in the type of x."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


def fuse_norms(model: torch.nn.Module) -> int:
    """Replace the model's RMS norms; returns how many. The model's weights must be there.

    Stock ones are a dozen small operations. A module is replaced if it is called RMSNorm, has nothing but a weight, and
    computes the same formula: in some models the factor is 1 + weight. That is tried in the weight's type; in a 16-bit
    one stock norms round twice, so numbers differ within its precision. Names and parameters stay.
    """
    found = [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent.named_children()
        if type(module).__name__.endswith("RMSNorm")
    ]
    replaced = 0
    for parent, name, module in found:
        fused = _fused(module)
        if fused is not None:
            setattr(parent, name, fused)
            replaced += 1
    return replaced


@torch.no_grad()
def _fused(module: torch.nn.Module) -> FusedRMSNorm | None:
    eps = getattr(module, "variance_epsilon", None)
    if eps is None or [name for name, _ in module.named_parameters()] != ["weight"] or list(module.children()):
        return None
    weight = module.get_parameter("weight")
    fused = FusedRMSNorm(weight, eps)
    generator = torch.Generator().manual_seed(0)  # not the global one, from which runs draw
    probe = torch.randn(_PROBE_ROWS, *weight.shape, generator=generator).to(weight)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    same = torch.allclose(module(probe).to(weight.dtype), fused(probe), rtol=tolerance, atol=tolerance)
    return fused if same else None

"""Parameter names: from those of transformers to those of checkpoints, which SGLang's loaders know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)")


def checkpoint_names(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor under its name in a checkpoint; experts that transformers keeps in one tensor are split.

    `….experts.gate_up_proj` has shape (experts, 2 × intermediate, hidden), gate first; `….experts.down_proj` has
    (experts, hidden, intermediate). The parts are views. Loaders ignore unknown names silently, so a wrong
    name would leave old weights in place.
    """
    for name, tensor in tensors:
        fused = _FUSED.fullmatch(name)
        if fused is None or tensor.ndim != 3:
            yield name, tensor
            continue
        for expert, weights in enumerate(tensor):
            prefix = f"{fused['experts']}.{expert}"
            if fused["kind"] == "down_proj":
                yield f"{prefix}.down_proj.weight", weights
            else:
                gate, up = weights.chunk(2, dim=0)
                yield f"{prefix}.gate_proj.weight", gate
                yield f"{prefix}.up_proj.weight", up

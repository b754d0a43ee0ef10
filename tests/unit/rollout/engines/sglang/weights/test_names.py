from __future__ import annotations

import torch

from miles.services.rollout.engines.sglang.weights.names import checkpoint_names


def test_fused_experts_come_apart_gate_first() -> None:
    gate_up = torch.arange(2 * 6 * 4, dtype=torch.float32).view(2, 6, 4)
    down = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    named = {
        "model.layers.0.mlp.experts.gate_up_proj": gate_up,
        "model.layers.0.mlp.experts.down_proj": down,
        "model.layers.0.mlp.gate.weight": torch.zeros(2, 4),
    }
    found = dict(checkpoint_names(named.items()))
    prefix = "model.layers.0.mlp.experts"
    assert set(found) == {
        *(f"{prefix}.{i}.{kind}.weight" for i in (0, 1) for kind in ("gate_proj", "up_proj", "down_proj")),
        "model.layers.0.mlp.gate.weight",
    }
    assert torch.equal(found[f"{prefix}.1.gate_proj.weight"], gate_up[1, :3])
    assert torch.equal(found[f"{prefix}.1.up_proj.weight"], gate_up[1, 3:])
    assert torch.equal(found[f"{prefix}.0.down_proj.weight"], down[0])


def test_dense_names_are_left_alone() -> None:
    named = {"model.layers.0.mlp.gate_up_proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)}
    assert list(checkpoint_names(named.items())) == list(named.items())

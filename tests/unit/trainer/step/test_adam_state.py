from __future__ import annotations

import torch

from miles.services.trainer.step import adam_state


def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    parameter.grad = torch.arange(4.0) - 1
    optimizer.step()


def test_the_next_step_is_that_of_a_new_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    step(parameter, optimizer)
    fresh = torch.nn.Parameter(parameter.detach().clone())
    kept = optimizer.state[parameter]["exp_avg"]
    adam_state.reset(optimizer)
    assert optimizer.state[parameter]["exp_avg"] is kept
    step(parameter, optimizer)
    step(fresh, torch.optim.AdamW([fresh], lr=0.1))
    assert parameter.equal(fresh)


def test_counts_of_groups_and_masters() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.param_groups[0]["step"] = 3
    optimizer.state[parameter] = {"exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4), "master_param": torch.ones(4)}
    adam_state.reset(optimizer)
    assert optimizer.param_groups[0]["step"] == 0
    state = optimizer.state[parameter]
    assert [float(state[name].sum()) for name in ("exp_avg", "exp_avg_sq", "master_param")] == [0, 0, 4]

"""A dispatcher whose kernels are missing stops a run, and a plan names them."""

from __future__ import annotations

import importlib.util

import pytest
from config_cases import MINIMAL

from miles.config.checks.expert_kernels import dispatcher_faults
from miles.config.job import examine
from miles.config.schema.faults import RunFault

FLEX = {
    **MINIMAL,
    "train_backend": "megatron",
    "moe_token_dispatcher_type": "flex",
    "expert_model_parallel_size": 2,
    "actor_num_gpus_per_node": 2,
}


def test_a_cpu_has_no_kernels_of_flex() -> None:
    (fault,) = dispatcher_faults(examine({**FLEX, "device": "cpu"}).settings)
    assert isinstance(fault, RunFault)
    assert str(fault).startswith("moe_token_dispatcher_type = flex, but its kernels need GPUs, and device is cpu; set")


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is not None, reason="deep_ep is installed")
def test_the_missing_package_is_named() -> None:
    (fault,) = dispatcher_faults(examine({**FLEX, "device": "cuda"}).settings)
    assert isinstance(fault, RunFault)
    assert "its kernels are of the package deep_ep, which is not installed" in str(fault)


def test_other_dispatchers_need_nothing() -> None:
    assert list(dispatcher_faults(examine({**FLEX, "moe_token_dispatcher_type": "alltoall"}).settings)) == []

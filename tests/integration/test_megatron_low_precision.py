"""Megatron's layers in few bits: what they multiply is what engines are sent, in every layout.

Real megatron-core over gloo: all layouts are walked in one start.
"""

from __future__ import annotations

import pytest
from megatron_kit import needs_megatron

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600), needs_megatron]

FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
INT4 = {"int4_qat": True, "int4_layers": ["."], "int4_group_size": 32}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}

"""Megatron's layers in few bits: what they multiply is what engines are sent, in every layout.

Real megatron-core over gloo: all layouts are walked in one start.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from megatron_kit import SUPPORT, needs_megatron, run_python
from megatron_models import EXPERTS, TOP_K, config_of, write_config
from trainer_cases import write_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600), needs_megatron]

FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
INT4 = {"int4_qat": True, "int4_layers": ["."], "int4_group_size": 32}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}

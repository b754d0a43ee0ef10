"""What the peers of a comparison answer, and how SGLang is started for it."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.models import TINY_VOCABULARY

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SAMPLER = REPOSITORY / "benchmarks" / "gpu" / "sampler.py"
CPU_PYTHON = REPOSITORY / "tests" / "support" / "sglang_cpu" / "python"
PROMPT_TOKENS = 64
GPU_FLAGS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.8,
    "cuda_graph_bs_decode": [1, 8, 32, 64, 128, 256, 384, 512],
    "disable_prefill_cuda_graph": True,
    "sleep_on_idle": True,
    "log_level": "warning",
}
"""Idle servers of other peers poll nothing: they share cores with the one at work."""
CPU_FLAGS = {
    "attention_backend": "torch_native",
    "mem_fraction_static": 0.3,
    "sleep_on_idle": True,
    "log_level": "warning",
}
SPARE_CACHE = 1.2
"""Room in the cache for what is generated, times this. A service whose server's cache is nearly full at the end of a
round lets fewer requests run in the next ones (`ConcurrencyLimit`), which the bare engine does not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What each peer answers, and with what."""

    model: str
    groups: int
    samples: int
    """Responses to each prompt."""
    tokens: int
    """Of the longest round; bounds the cache."""
    device: str = "cuda"
    python: str = ""
    """Interpreter that has SGLang, when it is another one."""
    routing: bool = False
    """Whether routed experts are recorded."""
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """More SGLang flags, with underscores."""
    profile: str = ""
    """Folder for samples of the rollout service and of SGLang's front process; empty: none can be taken."""

    @property
    def dtype(self) -> str:
        """What SGLang computes in."""
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def server_flags(self) -> dict[str, Any]:
        """What all peers give SGLang."""
        flags = dict(GPU_FLAGS if self.device == "cuda" else CPU_FLAGS)
        longest = self.groups * self.samples * (PROMPT_TOKENS + self.tokens + 16)
        return {**flags, "max_total_tokens": int(longest * SPARE_CACHE), **self.flags}

    @property
    def interpreter(self) -> str:
        """The one that runs SGLang."""
        return str(CPU_PYTHON) if self.device == "cpu" else self.python or sys.executable

    @property
    def samples_of(self) -> dict[str, pathlib.Path]:
        """File of samples of each process that is sampled."""
        names = ("rollout", "sglang") if self.profile else ()
        return {name: pathlib.Path(self.profile).absolute() / f"{name}.samples" for name in names}

    def job(self, folder: pathlib.Path) -> dict[str, Any]:
        """A job whose engine is like the bare one."""
        requests = self.groups * self.samples
        python = self.interpreter
        if self.profile:
            python = str(pathlib.Path(self.profile).absolute() / "sglang-python")
            pathlib.Path(python).write_text(
                f'#!/bin/sh\nexec {self.interpreter} {SAMPLER} {self.samples_of["sglang"]} "$@"\n'
            )
            pathlib.Path(python).chmod(0o755)
        return {
            "hf_checkpoint": self.model,
            "prompt_data": "none.jsonl",
            "label_key": "label",
            "num_rollout": 1,
            "rollout_batch_size": self.groups,
            "n_samples_per_prompt": self.samples,
            "rollout_max_response_len": self.tokens,
            "rm_type": "exact_match",
            "rollout_backend": "sglang",
            "rollout_dtype": self.dtype,
            "rollout_engine_python": python,
            "device": self.device,
            "run_dir": str(folder),
            "max_running_requests": requests,
            "sglang_server_concurrency": requests,
            "use_rollout_routing_replay": self.routing,
            "lr": 1e-6,
            **{f"sglang_{name}": value for name, value in self.server_flags.items()},
        }


def prompts(count: int) -> list[list[int]]:
    """Random prompts without a common prefix, of tokens that every model has."""
    rng = random.Random(0)
    return [[rng.randrange(300, TINY_VOCABULARY - 1) for _ in range(PROMPT_TOKENS)] for _ in range(count)]

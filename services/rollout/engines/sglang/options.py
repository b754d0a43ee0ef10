"""What an SGLang engine is built from."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, Literal

WeightPath = Literal["tensor", "disk", "distributed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SglangOptions:
    """Servers to start or to attach to, and how to treat them."""

    hf_checkpoint: str
    device: str = "cuda"
    """cpu, cuda, or cuda:N: the first GPU of the first server."""
    dtype: str = "bfloat16"
    engines: int = 1
    """Servers to start; without effect when `addresses` are given."""
    gpus_per_engine: int = 1
    """Tensor-parallel size of one server."""
    addresses: tuple[str, ...] = ()
    """host:port of running servers to attach to instead of starting any."""
    python: str = sys.executable
    """Interpreter that has SGLang."""
    server_flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """SGLang's own flags by name, with underscores."""
    max_running_requests: int | None = None
    """Requests that one server decodes at once; None leaves it to the server."""
    max_total_tokens: int | None = None
    """Prompt and response together; None: what the model allows."""
    concurrency: int = 512
    """Requests that one server is given at once, at most."""
    routed_experts: bool = False
    """Whether servers record the experts that each token was routed to."""
    memory_saver: bool = False
    """Whether servers can release their memory."""
    weight_path: WeightPath = "tensor"
    """How weights get into a server: tensors of this process, files that both sides see, or by the trainer's own
    broadcasts, of which the server is a member. Versions that do not come by broadcast are handed over as tensors."""
    weight_dir: pathlib.Path | None = None
    """Folder for the files of the disk path."""
    bucket_bytes: int = 512 << 20
    """Weights handed over at once."""
    random_seed: int = 42
    log_dir: pathlib.Path | None = None
    """Folder for the servers' logs; None discards them."""
    name: str = "engine"
    """Prefix of request ids and log files, unique among those who share a server."""
    start_timeout_s: float = 900.0
    order_timeout_s: float = 300.0
    """How long a server may take for one order, e.g. to load a bucket."""
    hang_timeout_s: float = 300.0
    """A server whose scheduler does nothing for the requests it has for so long hangs, although it answers probes."""
    silence_timeout_s: float = 30.0
    """A server that answers no probe for so long is dead."""

    @property
    def on_gpu(self) -> bool:
        """Whether servers compute on GPUs."""
        return self.device.startswith("cuda")

    @property
    def first_gpu(self) -> int:
        """Number of the first server's first GPU."""
        return int(self.device.partition(":")[2] or 0)

"""The options of an SGLang engine."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, Literal

from miles.config.server_groups import Server
from miles.precision.recipe import Recipe
from miles.weights.naming.contract import WeightContract

WeightPath = Literal["tensor", "disk", "distributed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SglangOptions:
    """Servers to start or to attach to, and how to run them."""

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
    servers: tuple[Server, ...] = ()
    """The servers to start where they differ, instead of `engines` of `gpus_per_engine` GPUs."""
    max_running_requests: int | None = None
    """Requests that one server decodes at once; None leaves it to the server."""
    max_total_tokens: int | None = None
    """Prompt and response together; None: what the model allows."""
    concurrency: int = 512
    """Most requests that one server is given at once."""
    routed_experts: bool = False
    """Whether servers record the experts that each token was routed to."""
    memory_saver: bool = False
    """Whether servers can release their memory."""
    earlier_responses: bool = False
    """Whether earlier responses to a prompt come with its requests, as drafts."""
    weight_path: WeightPath = "tensor"
    """How weights get into a server: tensor shares this process's memory with it, disk writes files that both see, and
    distributed makes it a member of the trainer's broadcasts; versions that are not broadcast go as tensors."""
    weight_dir: pathlib.Path | None = None
    """Folder for the files of the disk path."""
    contract: WeightContract = dataclasses.field(default_factory=lambda: WeightContract(form="checkpoint"))
    """Which tensors each version of the policy consists of."""
    recipe: Recipe | None = None
    """By which matrices are quantised, as they are published and served; None: as `dtype`."""
    bucket_bytes: int = 512 << 20
    """Most bytes of weights in one bucket."""
    random_seed: int = 42
    log_dir: pathlib.Path | None = None
    """Folder for the servers' logs; None discards them."""
    name: str = "engine"
    """Prefix of request ids and log files; unique among the engines that share a server."""
    start_timeout_s: float = 900.0
    call_timeout_s: float = 300.0
    """How long a server may take for one call, e.g. to load a bucket."""
    hang_timeout_s: float = 300.0
    """A server whose scheduler makes no progress on its requests for this long is lost, even if it answers probes."""
    probe_interval_s: float = 1.0
    """How often a server is asked for its load."""
    first_probe_s: float = 0.0
    """How long a server that is ready is left alone before that."""
    silence_timeout_s: float = 30.0
    """A server that answers no probe for this long is lost."""

    @property
    def on_gpu(self) -> bool:
        """Whether servers compute on GPUs."""
        return self.device.startswith("cuda")

    @property
    def repacks(self) -> bool:
        """Whether servers repack experts after an update."""
        return self.recipe is not None and self.recipe.format == "int4"

    @property
    def serves_fp8(self) -> bool:
        """Whether servers hold FP8 weights."""
        return self.recipe is not None and self.recipe.format == "fp8_block"

    @property
    def count(self) -> int:
        """Servers of this engine."""
        return len(self.addresses) or len(self.servers) or self.engines

    def gpus_of(self, index: int) -> int:
        """Tensor-parallel size of a server that is started here."""
        return self.servers[index].gpus if self.servers else self.gpus_per_engine

    def flags_of(self, index: int) -> Mapping[str, Any]:
        """SGLang's own flags of a server."""
        return {**self.server_flags, **self.servers[index].flags} if self.servers else self.server_flags

    def first_gpu_of(self, index: int) -> int:
        """Index of a server's first GPU."""
        return self.first_gpu + sum(self.gpus_of(before) for before in range(index))

    @property
    def own_gpus(self) -> range:
        """Indices of the GPUs of the servers that are started here; empty on a CPU and for attached servers."""
        end = self.first_gpu_of(self.count) if self.on_gpu and not self.addresses else self.first_gpu
        return range(self.first_gpu, end)

    @property
    def first_gpu(self) -> int:
        """Index of the first server's first GPU."""
        return int(self.device.partition(":")[2] or 0)

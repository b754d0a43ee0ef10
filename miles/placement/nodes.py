"""Nodes and their GPUs: those of this machine, and ones that are assumed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

GIB = 1 << 30
H200 = "141GB"
"""Memory of a GPU of which nothing is said."""
_USABLE = 0.99
"""GiB that a program sees of each GB that a vendor names: 139.8 of an H200's 141, 79.1 of an H100's 80."""
_NODE = re.compile(r"(\d+)(?:x(\d+(?:\.\d+)?)(GB|GiB))?")
_MOST = 4096
"""Nodes and GPUs of a node."""


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One machine."""

    gpus: int
    """How many; they are numbered from 0, as a process sees them."""
    gpu_bytes: int | None = None
    """Memory of each; None when it is not known."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes that a run may use, the launcher's first."""

    nodes: tuple[Node, ...]
    assumed: bool = False
    """Whether this is what somebody has said, and not what was found."""

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return sum(node.gpus for node in self.nodes)

    def __str__(self) -> str:
        return ", ".join(f"{node.gpus} GPUs" for node in self.nodes)


def parse_cluster(text: str) -> Cluster:
    """Parse `8,8`, or `8x80GB,4x24GiB`: for each node its GPUs, and the memory of each of them (141GB when left out).

    GiB are 2^30 bytes. GB are what vendors name, of which a program sees 0.99 GiB each. Raises ValueError.
    """
    return Cluster(tuple(_node(part.strip(), text) for part in text.split(",")), assumed=True)


def local_cluster(gpus: int, nodes: int = 1, gpu_bytes: Sequence[int] = ()) -> Cluster:
    """Return this machine and others like it.

    Args:
        gpus: those that this process sees.
        nodes: how many machines the run has.
        gpu_bytes: memory of each GPU here, as far as it is known; the smallest counts.
    """
    return Cluster((Node(gpus, min(gpu_bytes, default=None)),) * nodes)


def _node(part: str, text: str) -> Node:
    match = _NODE.fullmatch(part)
    if match is None:
        raise ValueError(f"{part!r} is not the number of a node's GPUs; write 8,8 or 8x80GB,8x80GB")
    gpus = int(match[1])
    if not 0 < gpus <= _MOST or text.count(",") >= _MOST:
        raise ValueError(f"a node has 1 to {_MOST} GPUs, and a run at most {_MOST} nodes")
    amount, unit = (match[2], match[3]) if match[2] else (H200.removesuffix("GB"), "GB")
    return Node(gpus, int(float(amount) * GIB * (1 if unit == "GiB" else _USABLE)))

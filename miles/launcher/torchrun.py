"""The command that starts the trainer's ranks on one node."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from miles.addresses import split_address


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One node of the trainer, and where its ranks meet those of the others."""

    rank: int
    """0 for the one with the trainer's rank 0."""
    count: int
    """Nodes in all."""
    ranks: int
    """Ranks on each of them."""
    master: str
    """host:port on node 0; its port may be a placeholder in a plan."""


def torchrun(node: Node, program: Sequence[str]) -> tuple[str, ...]:
    """Return the command that runs a program, `-m MODULE FLAGS`, as the ranks of a node.

    The rendezvous is static: node 0 serves it, and the ranks start when all nodes are there. It ends with the ranks of
    its node; whoever started it starts it again.
    """
    host, _, port = node.master.rpartition(":")
    nodes = () if node.count == 1 else ("--nnodes", str(node.count), "--node-rank", str(node.rank))
    where = ("--master-addr", host.strip("[]"), "--master-port", port)
    launch = (sys.executable, "-m", "torch.distributed.run", *nodes, "--nproc-per-node", str(node.ranks), *where)
    return (*launch, *program)


def master_of(node: Node) -> tuple[str, int]:
    """Return host and port of the rendezvous."""
    return split_address(node.master)

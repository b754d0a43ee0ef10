from __future__ import annotations

import pytest

from miles.placement.nodes import GIB, Node, local_cluster, parse_cluster


def test_gpus_are_given_node_by_node_with_or_without_their_memory() -> None:
    cluster = parse_cluster("8, 4x80GB,2x24GiB")
    assert [node.gpus for node in cluster.nodes] == [8, 4, 2]
    assert cluster.assumed
    assert cluster.gpus == 14
    h200, h100, other = (node.gpu_bytes for node in cluster.nodes)
    assert h200 is not None
    assert h100 is not None
    assert abs(h200 - 139.8 * GIB) < GIB  # as nvidia-smi shows an H200
    assert abs(h100 - 79.1 * GIB) < GIB
    assert other == 24 * GIB


@pytest.mark.parametrize("text", ["", "8,", "0", "-1", "8x", "8x80", "8 GPUs", "eight", "8;8", "99999", "8x1TB"])
def test_what_is_no_list_of_gpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="GPUs"):
        parse_cluster(text)


def test_the_smallest_gpu_of_this_machine_counts() -> None:
    assert local_cluster(2, nodes=2, gpu_bytes=[5, 3]).nodes == (Node(2, 3), Node(2, 3))
    assert local_cluster(0).gpus == 0

"""Ranks of a trainer export models bucket by bucket and broadcast them; none of two holds a model."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
from collections.abc import Iterator

import pytest
import torch
from broadcast_kit import read, transport
from export_ranks import BUCKET_BYTES
from trainer_cases import write_dense_model, write_moe_model
from weightsync_processes import Lines

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [f"{family}-{dtype}" for family in ("untied", "tied", "moe") for dtype in DTYPES]


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def offers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A folder with a version per case, offered by one rank or two."""
    root = tmp_path_factory.mktemp("offers")
    models = {
        "untied": write_dense_model(root / "untied", tied=False),
        "tied": write_dense_model(root / "tied", tied=True),
        "moe": write_moe_model(root / "moe"),
    }
    cases = []
    for case in CASES:
        family, dtype = case.split("-")
        (root / case).mkdir()
        cases.append([case, str(models[family]), dtype])
    script = pathlib.Path(__file__).parent.parent / "support" / "export_ranks.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    process = Lines([*torchrun, str(script), str(root), json.dumps(cases)])
    process.wait_for(lambda line: line == "offering", "the offers")
    yield root
    (root / "stop").touch()
    process.process.wait(60)


def stored_weights(model: pathlib.Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return {name: p.detach().to(dtype) for name, p in loaded.named_parameters(remove_duplicate=True)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engines", [1, 2])
def test_every_engine_gets_the_bytes_of_the_whole_model(offers: pathlib.Path, case: str, engines: int) -> None:
    published = read(offers / case)
    receivers = [transport() for _ in range(engines)]
    with concurrent.futures.ThreadPoolExecutor(engines) as threads:
        received = list(threads.map(lambda receiver: receiver.receive(*published), receivers))
    family, dtype = case.split("-")
    expected = stored_weights(offers / family, DTYPES[dtype])
    for weights in received:
        assert weights.tensors.keys() == expected.keys()
        assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in expected.items())
    for receiver in receivers:
        receiver.close()


@pytest.mark.parametrize("offers", [2], indirect=True, ids=["2ranks"])
@pytest.mark.parametrize("case", CASES)
def test_both_ranks_send_and_neither_holds_more_than_two_buckets(offers: pathlib.Path, case: str) -> None:
    handle, manifest = read(offers / case)
    sources = [bucket.source for bucket in handle.collective.buckets]
    assert len(set(sources)) == 2
    largest_tensor = max(tensor.nbytes for tensor in manifest.tensors)
    for rank in range(2):
        said = json.loads((offers / case / f"rank{rank}.json").read_text())
        assert said["count"] == len(sources) >= 4
        # Parts of equal size leave a row of padding per tensor, and tensors are aligned.
        assert said["largest"] <= 1.1 * max(BUCKET_BYTES, largest_tensor)
        assert said["peak"] <= 2 * said["largest"] < manifest.total_bytes

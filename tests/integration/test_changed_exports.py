"""Ranks publish what changed in their shards: what is gathered, written and read, and what an engine then holds."""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import write_dense_model, write_moe_model
from weight_host import JOB, POLICY, Host, Tensors, raw
from weightsync_processes import ENVIRONMENT

from miles.weights import WeightSubscriber

SCRIPT = pathlib.Path(__file__).parent.parent / "support" / "changed_ranks.py"
DEADLINE_S = 400.0
BFLOAT16 = {"rollout_dtype": "bfloat16", "use_dynamic_batch_size": True}


class RecordingEngine:
    """Keeps a copy of every version that it is given."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.device = torch.device("cpu")
        self.held: list[dict[str, torch.Tensor]] = []

    async def load_weights(self, version: int, tensors: Tensors) -> float:
        self.version = version
        self.held.append({name: tensor.clone() for name, tensor in tensors.items()})
        return 0.0

    async def weight_bytes(self) -> Tensors:
        return self.held[-1]


@pytest.fixture
async def host(tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    """A service with storage."""
    made = Host(tmp_path, disk_dir=tmp_path / "shared")
    await made.start()
    yield made
    await made.close()


async def publish(
    host: Host,
    out: pathlib.Path,
    model: pathlib.Path,
    ranks: int,
    flags: Mapping[str, Any],
    steps: list[Any],
    transport: str = "DISK_DELTA",
) -> list[dict[str, Any]]:
    """Have a trainer of so many ranks take the steps; returns what each took, with the weights as `weights`."""
    out.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = [str(SCRIPT), str(out), str(model), host.address, transport, json.dumps(dict(flags)), json.dumps(steps)]
    process = await asyncio.create_subprocess_exec(sys.executable, *torchrun, *arguments, env=ENVIRONMENT)
    assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 0
    return [
        {**json.loads((out / f"{number}.json").read_text()), "weights": load_file(out / f"{number}.safetensors")}
        for number in range(len(steps))
    ]


async def test_a_few_per_cent_of_the_values_cost_a_few_per_cent_of_the_bytes(
    host: Host, tmp_path: pathlib.Path
) -> None:
    engine = RecordingEngine()
    subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine)
    await subscriber.start()
    model = write_dense_model(tmp_path / "model", hidden_size=128, intermediate_size=384)
    steps = [
        {"version": 3},
        {"version": 4, "share": 0.01, "base_vanishes": True},
        {"version": 5, "share": 0.05, "base_vanishes": True},
        {"version": 6, "share": 0.02, "fails": True},
        {"version": 7},
        {"version": 8, "share": 1.0},
        {"version": 4, "share": 0.02},
        {"version": 5},
        {"version": 6, "share": 0.02},
    ]
    took = await publish(host, tmp_path / "first", model, 2, BFLOAT16, steps)
    start, one, five, failed, after, everywhere, lower, same, _ = took
    assert start["gathered"] == start["total"] < start["written"], "the first version is full"
    for each, share in ((one, 0.01), (five, 0.05)):
        assert each["gathered"] < 2.5 * share * each["total"]
        assert each["written"] < 2.5 * share * each["total"] + 20_000, "of which headers are a few kilobytes"
    assert failed["gathered"] < 0.05 * failed["total"]
    assert "written" not in failed
    assert after["gathered"] == 0, "rank 0 has it from the version that failed"
    assert 0.3 * after["total"] < after["written"] < 0.9 * after["total"], "what was written is gone"
    assert everywhere["gathered"] == everywhere["total"], "in full, as nearly all has changed"
    assert lower["gathered"] < 0.05 * lower["total"]
    assert same["gathered"] == 0
    assert same["written"] > same["total"], "a full version is due; it is gathered no more than another"
    assert [each.get("full") for each in took] == [True, False, False, None, False, False, False, True, False]

    again = await publish(host, tmp_path / "second", model, 2, BFLOAT16, [{"version": 2}, {"version": 3}])
    assert again[0]["gathered"] == again[0]["total"], "a trainer that was restarted has kept nothing"
    assert again[0]["full"]
    assert again[1]["gathered"] == 0
    wanted = [each["weights"] for each in (*took, *again) if "written" in each]
    assert len(engine.held) == len(wanted) == len(steps) + 1
    for held, expected in zip(engine.held, wanted, strict=True):
        assert raw(held) == raw(expected)
    await subscriber.close()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["DISK_DELTA", "GRPC_CHUNKS"])
@pytest.mark.parametrize("flags", [BFLOAT16, {"rollout_dtype": "float32"}], ids=["bfloat16", "float32"])
async def test_shards_of_uneven_sizes_and_experts_arrive_bit_for_bit(
    host: Host, tmp_path: pathlib.Path, flags: Mapping[str, Any], transport: str
) -> None:
    engine = RecordingEngine()
    subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine)
    await subscriber.start()
    model = write_moe_model(tmp_path / "model")
    steps = [{"version": version, "share": share} for version, share in enumerate([0.0, 0.03, 0.0, 0.3, 0.01, 0.001])]
    took = await publish(host, tmp_path / "out", model, 3, flags, steps, transport)
    for held, each in zip(engine.held, took, strict=True):
        assert raw(held) == raw(each["weights"])
    assert [each["gathered"] < 0.1 * each["total"] for each in took] == [False, True, True, False, True, True]
    assert all(took[i]["written"] < 0.2 * took[i]["total"] + 20_000 for i in (1, 2, 5)), "headers besides"
    await subscriber.close()

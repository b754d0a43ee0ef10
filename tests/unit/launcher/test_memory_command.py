"""`miles plan memory`: tables and JSON by precision from a config.json alone, its refusals, and the docs' table."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from miles import cli
from miles.launcher.memory_plan import PRECISIONS
from miles.memory.by_format import weights_by_format
from miles.memory.model import shape_of

ROOT = pathlib.Path(__file__).parents[3]
PUBLISHED: dict[str, Any] = json.loads((ROOT / "tests/support/large_models.json").read_text())
DEEPSEEK = ROOT / "tests/support/deepseek_v3.json"
LARGE = [
    *("--hf-checkpoint", str(DEEPSEEK), "--actor-num-nodes", "16", "--tensor-model-parallel-size", "8"),
    *("--expert-model-parallel-size", "64", "--use-distributed-optimizer", "--rollout-num-gpus-per-engine", "8"),
    *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
]


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    cli.main(["plan", "memory", "--json", *flags])
    return dict(json.loads(capsys.readouterr().out))


def part(document: dict[str, Any], process: str, name: str) -> int:
    parts = next(column["parts"] for column in document["columns"] if column["process"] == process)
    return int(sum(each["bytes"] for each in parts if each["name"] == name))


def test_every_precision_of_a_large_model_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    found = {name: planned(capsys, *LARGE, f"--precision={name}") for name in PRECISIONS}
    engines = {name: part(each, "engine", "engine weights") for name, each in found.items()}
    assert engines["int4_all"] < engines["int4"] < engines["fp8"] == engines["fp8_rollout"] < engines["bf16"] * 0.51
    assert len({part(each, "trainer", "policy weights") for each in found.values()}) == 1  # in 16 bits all the same
    cached = "weights in FP8 by rows and columns"
    assert [name for name, each in found.items() if part(each, "trainer", cached)] == ["fp8"]
    assert [name for name, each in found.items() if part(each, "trainer", "rounded weights")] == ["int4", "int4_all"]
    assert sum(column["ranks"] for column in found["bf16"]["columns"] if column["process"] == "trainer") == 128
    assert found["int4"]["weights"]["int4 by 128, routed experts"]["bytes"] == found["int4"]["published_bytes"]
    assert found["fp8"]["parameters"]["total"] == 671_026_419_200
    for each in found.values():
        for column in each["columns"]:
            assert column["peak"] <= sum(p["bytes"] for p in column["parts"])


def test_the_table_has_a_column_for_each_kind_of_rank(capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["--pipeline-model-parallel-size", "4", "--decoder-last-pipeline-num-layers", "13"]
    stages += ["--expert-model-parallel-size", "32"]
    assert (
        cli.main(["plan", "memory", *LARGE, *stages, "--precision", "fp8", "--assume-gpus", ",".join(["8"] * 17)]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("GiB of each"))
    assert header.count("trainer × 32") == 4
    assert header.endswith("engine × 8")
    assert any(line.startswith("fp8_block, every matrix of the layers") and line.endswith("8.03") for line in lines)
    assert any(line.startswith("note: activations are counted as in 16 bits") for line in lines)
    assert "trainer: 16 bits and fp8_block" in lines


def test_colocated_processes_add_up_on_their_gpu_and_in_host_memory(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *LARGE, "--colocate", "--precision", "int4")
    for column in found["columns"]:
        assert column["gpu"]["peak"] >= column["peak"]
    apart = planned(capsys, *LARGE, "--precision", "int4")
    assert found["host_bytes"] > apart["host_bytes"]  # weights and optimizer are parked there


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_folder_or_a_file_will_do_as_the_model(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.3-70B"]))
    (tmp_path / "other.json").write_text(json.dumps(PUBLISHED["Llama-3.3-70B"]))
    flags = ["--device", device, "--precision", "int4"]
    found = [
        planned(capsys, "--hf-checkpoint", str(tmp_path / name), *flags) for name in ("", "config.json", "other.json")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["published_bytes"] < found[0]["parameters"]["total"]  # of a dense model every matrix is in INT4


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ([], "hf_checkpoint is not set, and the estimate is of a model"),
        (["--hf-checkpoint", "nowhere"], "there is no nowhere; give a config.json or its folder"),
        ([*LARGE, "--precision", "fp7"], "--precision = fp7, but there is no such precision; use bf16, fp8,"),
        ([*LARGE, "--assume-gpus", "8"], "actor_num_nodes = 16, but there is 1 node"),
        ([*LARGE, "--num-layer", "3"], "--num-layer"),
        (
            [*LARGE, "--precision", "fp8", "--train-backend", "megatron", "--te-precision-config-file", "/no.yaml"],
            "1 fault in the configuration:\n  te_precision_config_file = /no.yaml, but it cannot be read",
        ),
    ],
)
def test_what_cannot_be_estimated_is_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], refusal: str
) -> None:
    assert cli.main(["plan", "memory", *flags]) == 2
    assert refusal in capsys.readouterr().out


def test_what_is_no_decoder_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert cli.main(["plan", "memory", "--hf-checkpoint", str(tmp_path)]) == 2
    assert "it does not say the sizes of a decoder" in capsys.readouterr().out
    assert cli.main(["plan", "memory", "--help"]) == 0
    assert "int4_all" in capsys.readouterr().out


def test_the_docs_have_the_sizes_of_published_models() -> None:
    """Whole rows, so that the page is corrected by copying what is missing from the error."""
    page = (ROOT / "docs/machines.md").read_text()
    models = {**PUBLISHED, "DeepSeek-V3": json.loads(DEEPSEEK.read_text())}
    rows = []
    for name, config in models.items():
        shape = shape_of(config)
        assert shape is not None
        by_128, by_32 = (weights_by_format(shape, size) for size in (128, 32))
        held = [by_128["bf16"], by_128["fp8_block, every matrix of the layers"]]
        for size, formats in ((128, by_128), (32, by_32)):
            held += [
                formats.get(f"int4 by {size}, routed experts"),
                formats[f"int4 by {size}, every matrix of the layers"],
            ]
        cells = ("–" if each is None else f"{each.bytes / 1e9:.0f} ({each.bits:.2f})" for each in held)
        rows.append(f"| {name} | {held[0].parameters / 1e9:.1f} | {' | '.join(cells)} |")  # type: ignore[union-attr]
    assert [row for row in rows if row not in page] == []

"""`miles plan` and the dry run of a cluster that is assumed: what starts where, what it takes, and what is refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import yaml
from config_cases import MINIMAL

from miles import cli
from miles.config.command.flags import parse_command_line, to_command_line
from miles.launcher import main as launcher

DEEPSEEK = pathlib.Path(__file__).parents[2] / "support/deepseek_v3.json"
RECIPE = (
    "--actor-num-gpus-per-node 8 --rollout-num-gpus 8 --hf-checkpoint model --advantage-estimator grpo "
    "--tensor-model-parallel-size 8 --expert-model-parallel-size 4 --prompt-data prompts.jsonl --num-rollout 3000"
)
LARGE_MOE = RECIPE.split()
"""The public recipe for large mixtures of experts, as it is."""


@pytest.fixture
def deepseek(files: pathlib.Path) -> pathlib.Path:
    """A folder with DeepSeek-V3's configuration, and no weights."""
    (files / "model" / "config.json").write_text(DEEPSEEK.read_text())
    (files / "model" / "model.safetensors").unlink()
    return files


def dry_run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert launcher.main([*flags, "--dry-run"]) == 0
    return dict(yaml.safe_load(capsys.readouterr().out))


def test_the_dry_run_of_a_large_moe_says_what_starts_where_and_that_it_does_not_fit(
    deepseek: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = dry_run(capsys, *LARGE_MOE, "--assume-gpus", "8,8")
    processes = {process["name"]: process for process in described["processes"]}
    assert processes["rollout-0"]["node"].startswith("1,")
    assert "--device cuda:0 --num-gpus 8" in processes["rollout-0"]["command"]
    assert "--nproc-per-node 8" in processes["trainer-0"]["command"]
    settings = described["settings"]
    assert (settings["train_backend"], settings["rollout_backend"]) == ("megatron", "sglang")
    assert settings["sequence_parallel"]
    lines = described["memory per GPU and what starts where"]
    assert lines[0].startswith("node 0, GPUs 0 to 7: trainer-0 ranks 0 to 7: about 2.")
    assert lines[0].endswith("TiB of 139.6 GiB, DOES NOT FIT")
    assert lines[1].startswith("node 1, GPUs 0 to 7: rollout-0 servers 0 to 7: about 640.0 GiB of 139.6 GiB")
    assert any("would fit, on 16 nodes of 8 such GPUs: --actor-num-nodes 16" in line for line in lines)
    assert any("a server of 8 such GPUs would hold it" in line for line in lines)
    missing = described["before it can run"]
    assert any("there are no weights in it" in fault for fault in missing)
    assert any(fault.startswith("rm_type is not set") for fault in missing)
    assert any(fault.startswith("rollout_workers_elsewhere = 0, but 1 of the rollout services") for fault in missing)


def test_rollouts_of_other_nodes_come_with_their_command(
    deepseek: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--rollout-workers-elsewhere", "1", "--host", "10.0.0.1", "--assume-gpus", "8,8"]
    described = dry_run(capsys, *LARGE_MOE, *there)
    assert "rollout-0" not in [process["name"] for process in described["processes"]]
    assert "--worker-id rollout-0" in described["start on other hosts"]["rollout-0, on node 1"]
    assert not any("rollout_workers_elsewhere" in fault for fault in described["before it can run"])
    assert cli.main(["plan", *LARGE_MOE, *there]) == 22
    assert "node 1  rollout-0, on node 1  GPUs 0 to 7 of node 1" in capsys.readouterr().out


def test_the_layout_that_is_named_fits(deepseek: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, *LARGE_MOE, "--assume-gpus", "8,8")["memory per GPU and what starts where"]
    named = next(line for line in lines if "this would fit" in line).partition(": ")[2].split()
    flags = [*LARGE_MOE[4:], *named, "--rollout-external-engine-addrs", "a:1", "--host", "10.0.0.1"]
    flags = flags[: flags.index("--tensor-model-parallel-size")] + flags[flags.index("--prompt-data") :]
    assert cli.main(["plan", *flags, "--json", "--assume-gpus", ",".join(["8"] * 16)]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"]
    assert len(planned["gpus"]) == 128


def test_a_plan_that_does_not_fit_has_its_own_exit_code(
    deepseek: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *LARGE_MOE, "--assume-gpus", "8,8"]) == 22
    printed = capsys.readouterr().out
    assert "policy optimizer" in printed
    assert "float32 masters and Adam's moments" in printed
    assert "mem_fraction_static" in printed
    assert cli.main(["plan", *LARGE_MOE, "--json", "--assume-gpus", "8,8"]) == 22
    planned = json.loads(capsys.readouterr().out)
    assert not planned["fits"]
    assert {gpu["node"]: gpu["processes"][0]["name"] for gpu in planned["gpus"]} == {0: "trainer-0", 1: "rollout-0"}
    parts = planned["gpus"][0]["processes"][0]["parts"]
    assert sum(part["bytes"] for part in parts) == planned["gpus"][0]["peak"]


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ([*LARGE_MOE, "--assume-gpus", "8"], "rollout_num_gpus = 8, but the trainer's 8 leave 0 of the 8 GPUs; turn"),
        (
            [*LARGE_MOE, "--assume-gpus", "4,4"],
            "actor_num_gpus_per_node = 8, but node 0 has 4 GPUs; set it to at most 4",
        ),
        ([*LARGE_MOE, "--assume-gpus", "some"], "--assume-gpus = some, but 'some' is not the number of a node's GPUs"),
        ([*LARGE_MOE, "--assume-gpus", "8,8", "--device", "cpu"], "device = cpu, but --assume-gpus says which GPUs"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(
    deepseek: pathlib.Path, capsys: pytest.CaptureFixture[str], flags: list[str], refusal: str
) -> None:
    assert launcher.main([*flags, "--dry-run"]) == 2
    assert refusal in capsys.readouterr().out


def test_a_run_does_not_assume_its_gpus(files: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main([*to_command_line(MINIMAL), "--assume-gpus", "1"]) == 2
    assert "--assume-gpus = 1 GPUs, but a run needs GPUs that are there; add --dry-run" in capsys.readouterr().out
    assert [fault.field for fault in parse_command_line(["--assume-gpus", "1"]).faults] == ["--assume-gpus"]
    assert parse_command_line(["--assume-gpus", "1"], starts_nothing=True).faults == []


def test_colocated_engines_share_the_gpus_of_one_node(
    deepseek: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = dry_run(capsys, *LARGE_MOE, "--colocate", "--assume-gpus", "8")
    first = described["memory per GPU and what starts where"][0]
    assert first.startswith("node 0, GPUs 0 to 7: trainer-0 ranks 0 to 7, rollout-0 servers 0 to 7:")


def test_a_plan_for_the_processor_adds_up_host_memory(files: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = to_command_line(MINIMAL | {"device": "cpu"})
    assert cli.main(["plan", *flags]) == 0
    assert "memory: not estimated" in capsys.readouterr().out
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "num_attention_heads": 4}
    (files / "model" / "config.json").write_text(json.dumps({**sizes, "intermediate_size": 128}))
    assert cli.main(["plan", *flags]) == 0
    printed = capsys.readouterr().out
    assert "node 0, host memory: at most about" in printed
    assert "policy optimizer" in printed
    assert cli.main(["plan", "--help"]) == 0
    assert "--assume-gpus 8,8" in capsys.readouterr().out


def test_a_plan_says_when_this_machine_has_too_little_memory(
    deepseek: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *to_command_line(MINIMAL | {"device": "cpu"}), "--json"]) == 22
    planned = json.loads(capsys.readouterr().out)
    assert planned["least_host_bytes"] > 671_026_419_200 * 16 > planned["host_bytes"]
    assert any("host memory does not suffice" in warning for warning in planned["warnings"])
    assert planned["placement"] is None
    assert any("there are no weights in it" in fault for fault in planned["before_it_can_run"])


@pytest.mark.parametrize(
    ("cluster", "changes", "warning"),
    [
        ("2x24GiB", {}, ""),
        ("2x24GiB", {"offload_rollout": False, "offload_train": False, "sglang_mem_fraction_static": 0.05},
         "engine and trainer do not fit on a GPU together"),
        ("2x3GiB", {}, "the engine does not fit on a GPU of 3.0 GiB: engine weights of 3."),
    ],
)  # fmt: skip
def test_what_shares_a_gpu_is_judged_by_its_turns(
    files: pathlib.Path, capsys: pytest.CaptureFixture[str], cluster: str, changes: dict[str, Any], warning: str
) -> None:
    sizes = {"hidden_size": 2048, "num_hidden_layers": 32, "vocab_size": 50_000, "num_attention_heads": 16}
    (files / "model" / "config.json").write_text(json.dumps({**sizes, "intermediate_size": 6144}))
    shared = {"colocate": True, "rollout_backend": "sglang", "rollout_num_gpus": 2, "actor_num_gpus_per_node": 2}
    changes = {"gradient_checkpointing": True, **changes}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in changes.items() if not isinstance(value, bool)]
    flags += [
        f"--{'' if value else 'no-'}{key.replace('_', '-')}" for key, value in changes.items() if value in (True, False)
    ]
    code = cli.main(["plan", *to_command_line(MINIMAL | shared), *flags, "--json", "--assume-gpus", cluster])
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert code == (22 if warning else 0), warnings
    assert any(text.startswith(warning) for text in warnings) if warning else not warnings

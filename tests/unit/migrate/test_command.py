from __future__ import annotations

import pathlib
import shlex

import pytest

from miles.cli import main
from miles.config.command.flags import parse_command_line
from miles.config.command.yaml_files import read_file

SCRIPTS = pathlib.Path(__file__).parent / "scripts"
COMMAND = """\
export SGLANG_LOG_LEVEL=info
python train.py \\
  --actor-num-gpus-per-node "$GPUS" \\
  --hf-checkpoint "$BASE_DIR/tiny" \\
  --save '/data/my runs/tiny' \\
  --prompt-data /data/train.jsonl \\
  --label-key answer \\
  --rm-type math \\
  --num-rollout 20 \\
  --rollout-batch-size 8 \\
  --n-samples-per-prompt 8 \\
  --max-running-requests 512 \\
  --sglang-cuda-graph-bs-decode 8 16 24 \\
  --max-weight-staleness 1 \\
  --train-env-vars '{"NCCL_DEBUG": "INFO"}'
"""


def test_a_script_of_bash_becomes_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", str(SCRIPTS / "run-tiny.sh")]) == 0
    said = capsys.readouterr()
    assert said.out == COMMAND
    assert [line for line in said.err.splitlines() if line] == [
        "13 flags, 1 not taken.",
        "Not taken:",
        "  --http-proxy = http://proxy:1, but services call each other without a proxy; leave it out",
        "Open, to be set in the shell or with --set:",
        '  $GPUS: line 10: it depends on [ "${FOUND}" -gt 1 ]',
        "  $BASE_DIR: line 17: nothing sets it",
        "Left out, because it changes nothing:",
        "  flags of the model's architecture: its config.json has them",
        "  --sglang-router-policy cache_aware: there is no router: the rollout service sends requests to its "
        "servers itself",
        "  --attention-softmax-in-fp32: the softmax of attention is computed in float32",
        "Environment variables that are not set:",
        "  MASTER_ADDR: the launcher says where processes meet (docs/nodes.md)",
        "Notes:",
        "  --sglang-max-running-requests is --max-running-requests",
        "  --sglang-cuda-graph-bs: it is sglang_cuda_graph_bs_decode in this version of SGLang",
        "  --max-weight-staleness 1: train_async.py generates a batch while it trains on the one before "
        "(docs/asynchrony.md)",
    ]


def test_what_is_given_is_put_in(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--set", "GPUS=8", "--set", "BASE_DIR=/models", "--set", "WITH_KL=1"]
    assert main(["migrate", str(SCRIPTS / "run-tiny.sh"), *given]) == 0
    said = capsys.readouterr()
    command = said.out.partition("python train.py")[2].replace("\\\n", " ")
    line = parse_command_line(shlex.split(command))
    assert line.faults == []
    assert (line.flat["hf_checkpoint"], line.flat["actor_num_gpus_per_node"]) == ("/models/tiny", "8")
    assert line.flat["use_kl_loss"] is True
    assert "Open" not in said.err


def test_a_script_of_python_becomes_a_file(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    assert main(["migrate", str(SCRIPTS / "run_tiny.py"), "--yaml"]) == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert read_file(str(file)) == (
        {
            "hf_checkpoint": "/models/tiny",
            "prompt_data": "/data/train.jsonl",
            "label_key": "answer",
            "rm_type": "math",
            "num_rollout": 5,
            "rollout_batch_size": 16,
            "train_env_vars": {"NVTE_DEBUG": "1", "A": "1"},
            "save": "$U_NEW_FOLDER/out",
        },
        [],
    )


def test_a_file_that_starts_nothing_or_cannot_be_read_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    assert main(["migrate", str(SCRIPTS / "models" / "tiny.sh")]) == 1
    assert "tiny.sh starts no train.py or train_async.py that could be found" in capsys.readouterr().err
    assert main(["migrate", str(tmp_path / "none.sh")]) == 2
    assert "none.sh cannot be read" in capsys.readouterr().err
    broken = tmp_path / "broken.py"
    broken.write_text("def (")
    assert main(["migrate", str(broken)]) == 2

"""`miles samples check` reads what the trainer records and names what does not fit."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from miles.cli import main
from miles.services.trainer.step.sample_log import MAX_TOKENS, SampleLog, TokenMetrics
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan
from miles.types.convert import group_to_proto
from miles.types.stored import read_groups, write_groups


def sample(index: int, length: int = 3) -> Sample:
    experts = np.tile(np.array([2, 0], np.uint8), (length + 1, 2, 1))
    return Sample(
        group_id=7,
        index=index,
        prompt="p",
        tokens=np.arange(length + 2, dtype=np.int32),
        response_length=length,
        response="r",
        reward=1.0,
        status=SampleStatus.COMPLETED,
        rollout_log_probs=np.full(length, -0.5, np.float32),
        rollout_routed_experts=experts,
        weight_versions=(VersionSpan(3, 0, 1), VersionSpan(4, 1, length)),
    )


def metrics(length: int) -> TokenMetrics:
    ones = np.ones(length, np.float32)
    return TokenMetrics(mask=ones, advantages=ones, train_log_probs=-ones, rollout_log_probs=-ones / 2)


@pytest.fixture
def run_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run that recorded two groups' samples of a step whole; one response is too long for the log."""
    samples = [sample(0), sample(1, MAX_TOKENS + 10)]
    log = SampleLog(tmp_path, 2, 0, None, whole=True)
    log.write(4, [(each, metrics(each.response_length)) for each in samples])
    return tmp_path


def config_of(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    model = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, **changes}
    (folder / "config.json").write_text(json.dumps(model))
    return folder


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    code = main(["samples", "check", *map(str, arguments)])
    return code, capsys.readouterr().out.splitlines()


def test_what_a_run_recorded_fits(run_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = config_of(run_dir)
    found = check(capsys, run_dir, "--hf-checkpoint", model, "--needs-routing")
    assert found == (0, ["4 samples in 2 files: no faults"])  # two in the log, two whole


def edit_line(path: pathlib.Path, change: Callable[[dict[str, Any]], None]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines[0])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (".tokens.jsonl", lambda line: line["rollout"].pop(), "rollout: 2 values; expected 3"),
        (".tokens.jsonl", lambda line: line["ids"].append(1), "ids: 4 values; expected 3"),
        (".tokens.jsonl", lambda line: line.update(rollout=[-1, 0.25, -1]), "rollout_log_probs: entry 1 is 0.25"),
        (".tokens.jsonl", lambda line: line.update(rollout=[-1, None, -1]), "rollout_log_probs: entry 1 is nan"),
        (".tokens.jsonl", lambda line: line.update(mask=[1, 3, 1]), "loss_mask: entry 1 is 3"),
        (".tokens.jsonl", lambda line: line.update(index=9), "ids: the file of per-token values has no line"),
        (".jsonl", lambda line: line["samples"][0].update(weight_versions=[[3, 0, 2]]), "weight_versions: cover 2"),
        (".jsonl", lambda line: line["samples"][0].update(status="DONE"), "status: DONE is not a status"),
        (".jsonl", lambda line: line["samples"][0].update(response_length=2), "ids: 3 values; expected 2"),
    ],
)
def test_a_fault_in_the_log_is_named_with_its_line(
    run_dir: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[dict[str, Any]], None],
    expected: str,
) -> None:
    log = run_dir / "samples" / "step_00000004.rank0.jsonl"
    edit_line(log.with_suffix(name), change)
    code, lines = check(capsys, run_dir)
    assert code == 1
    assert lines[0].startswith(f"{log}:1: sample 0 of group 7: {expected}")
    assert lines[-1].startswith("4 samples in 2 files: ")


def test_a_fault_of_a_whole_sample_is_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = sample(1)
    assert broken.rollout_routed_experts is not None
    broken.rollout_routed_experts[2, 1] = 3
    file = tmp_path / "step_00000000.rank0.groups.pb"
    write_groups(file, [SampleGroup("", 7, [sample(0), broken])])
    code, lines = check(capsys, file)
    assert code == 1
    assert lines[0].startswith(f"{file}: sample 1 of group 7: rollout_routed_experts: token 2 goes to experts [3, 3]")
    code, lines = check(capsys, file, "--hf-checkpoint", config_of(tmp_path, num_experts=2))
    assert [line.split(": ", 2)[1] for line in lines[:-1]] == ["sample 0 of group 7"] + ["sample 1 of group 7"] * 2


def test_samples_stored_one_message_each_are_read_and_their_faults_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "step_00000000.rank0.groups.pb"
    message = group_to_proto(SampleGroup("", 7, [sample(0)]))
    for shape, expected in [(3, "1 samples in 1 files: no faults"), (2, f"{file}: file: group 0 of {file} cannot be")]:
        message.samples[0].rollout_log_probs.shape[0] = shape
        payload = message.SerializeToString()
        file.write_bytes(len(payload).to_bytes(8, "little") + payload)
        code, lines = check(capsys, file)
        assert code == (shape != 3)
        assert lines[0].startswith(expected)
    assert "samples[0].rollout_log_probs: 12 bytes, but shape (2,)" in lines[0]


def test_a_byte_that_changed_is_a_fault(run_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_dir / "samples" / "step_00000004.rank0.groups.pb"
    payload = bytearray(file.read_bytes())
    payload[len(payload) // 2] ^= 1
    file.write_bytes(payload)
    code, lines = check(capsys, file)
    assert code == 1
    assert "group 0 of " in lines[0]
    assert "checksum: " in lines[0]


def test_a_file_that_was_cut_is_a_fault(run_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_dir / "samples" / "step_00000004.rank0.groups.pb"
    file.write_bytes(file.read_bytes()[:-1])
    code, lines = check(capsys, file)
    assert code == 1
    assert "the file is cut" in lines[0]
    file.write_bytes((5).to_bytes(8, "little") + b"\xff" * 5)
    assert "not a SampleGroup message" in check(capsys, file)[1][0]


def test_nothing_to_check_is_no_proof(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, tmp_path) == (2, ["0 samples in 0 files: no faults"])
    assert check(capsys, tmp_path / "missing") == (2, [])
    (tmp_path / "dense").mkdir()
    dense = config_of(tmp_path / "dense", num_experts=0)
    assert check(capsys, tmp_path, "--hf-checkpoint", dense) == (2, [])


def test_help_says_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["samples", "check", "--help"])
    assert ended.value.code == 0
    assert "--needs-routing" in capsys.readouterr().out


def test_groups_are_stored_as_they_are(tmp_path: pathlib.Path) -> None:
    groups = [SampleGroup("job", 7, [sample(0), sample(1)]), SampleGroup("job", 8, [])]
    write_groups(tmp_path / "file", groups)
    assert list(read_groups(tmp_path / "file")) == groups

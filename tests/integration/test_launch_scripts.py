"""Launch scripts of the most frequent forms pass the dry run, as they are and as `miles migrate` prints them."""

from __future__ import annotations

import json
import pathlib
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_tokenizer import save_tokenizer

from miles.config.command.flags import parse_command_line
from miles.launcher.dry_run import checked_plan, describe_run
from miles.migrate import command as migrate
from miles.migrate.shell_script import read_shell_script

SCRIPTS = pathlib.Path(__file__).parents[1] / "launch_scripts"
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.sh"))
FORMATS = {
    "21-qwen3-4b-fp8": [
        "fp8_format = e4m3: the trainer computes in FP8 (blocks of 128 x 128, scales in float32)",
        "rollout_weight_format = auto: engines get FP8",
    ],
    "22-qwen3-30b-a3b-int4": [
        "int4_qat = true: the trainer computes in INT4 (groups of 128)",
        "rollout_weight_format = auto: engines get INT4",
    ],
}
"""What a dry run says of scripts that train in few bits, by their flags and variables."""
KEYS = {"WANDB_KEY": "0" * 40}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What the scripts have below /root: folders of models without weights, converted ones, and data."""
    folder = tmp_path_factory.mktemp("root")
    for config in (SCRIPTS / "configs").glob("*.json"):
        model, converted = folder / config.stem, folder / f"{config.stem}_torch_dist"
        model.mkdir()
        (model / "config.json").write_text(config.read_text())
        save_tokenizer(model, "{{ messages[-1].content }}")
        (converted / "release").mkdir(parents=True)
        (converted / "latest_checkpointed_iteration.txt").write_text("release")
        (converted / "release" / ".metadata").write_bytes(b"")
        (converted / "release" / "metadata.json").write_bytes(b"")
    rows = [{"prompt": "2 + 2 =", "label": "4"}]
    chats = [{"messages": [{"role": "user", "content": "2 + 2 ="}], "prompt": "2 + 2 =", "label": "4"}]
    for name in ("dapo-math-17k/dapo-math-17k", "aime-2024/aime-2024"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("gsm8k/train", "gsm8k/test", "search/train"):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(chats), folder / f"{name}.parquet")
    return folder


def dry_run(words: list[str], root: pathlib.Path, run_dir: pathlib.Path) -> str:
    """Check a command line on nodes with 8 GPUs, where /root is `root`; return what would be started."""
    words = [word.replace("/root/", f"{root}/") for word in words]
    line = parse_command_line(
        [*words, "--run-dir", str(run_dir), "--dry-run", "--assume-gpus", ",".join(["8"] * 16)], starts_nothing=True
    )
    assert line.faults == []
    return describe_run(checked_plan(line))


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_script_passes_the_dry_run(
    name: str, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    launch = read_shell_script(SCRIPTS / f"{name}.sh", KEYS)
    text = dry_run(list(launch.words), root, tmp_path / "run")
    assert "trainer-0" in text
    assert ("name: rollout-0" in text) != ("train-only" in name)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_of_a_launch_script_passes_too(
    name: str,
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    assert migrate.main([str(SCRIPTS / f"{name}.sh"), *(f"--set={key}={value}" for key, value in KEYS.items())]) == 0
    out, err = capsys.readouterr()
    words = shlex.split(out.replace("\\\n", " "))
    assert words[:2] == ["python", "train.py"]
    assert " 0 not taken" in err
    text = dry_run(words[2:], root, tmp_path / "run")
    assert [line for line in FORMATS.get(name, []) if line not in text] == []

"""A run with automatic number types chooses and reports them, and can be resumed on a machine that differs."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import pytest
from whole_runs import Run, recipe

from miles.rpc import ExitCode

Start = Callable[[list[str], pathlib.Path], Run]


@pytest.mark.slow
def test_a_run_goes_on_from_a_machine_that_chose_another_type(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in for a processor without bfloat16 instructions, whatever the tests run on.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    few = {"rollout_batch_size": 4, "n_samples_per_prompt": 8}

    def run(name: str, dtype: str, **changes: object) -> Run:
        types = {"train_dtype": dtype, "rollout_dtype": dtype}
        begun = start_run(recipe(tiny_dense, tmp_path / name, **few, **types, **changes), tmp_path / name)
        assert begun.wait() == ExitCode.OK, begun.output()
        return begun

    first = run("first", "bfloat16", num_rollout=2)
    said = first.log.read_text()
    for worker in ("trainer-0", "rollout-0"):
        assert re.search(
            rf"{worker} is slow in bfloat16: a matrix product takes [\d.]+ times as long as in float32", said
        )
    second = run("second", "auto", num_rollout=4, load=tmp_path / "first" / "checkpoints")
    assert (
        "the trainer computes in float32, engines in float32: a bfloat16 matrix product takes" in second.log.read_text()
    )
    assert second.summary()["number_types"]["train_dtype"] == "float32"
    assert "step_00000002 at step 2" in second.log.read_text()
    # Trainer and engine agree to the bit in either type.
    differences = [line["train/train_rollout_logprob_abs_diff"] for line in second.metrics()]
    assert differences == [0.0] * 4  # the first two are those of the other run

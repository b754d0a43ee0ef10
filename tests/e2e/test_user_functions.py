"""A run in which functions of a recipe, written for slime, do all that functions of users can do."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable

import pytest
from whole_runs import Run, recipe

from miles.rpc import ExitCode

RECIPE = "tests.support.user_recipe."
Start = Callable[[list[str], pathlib.Path], Run]


def functions(folder: pathlib.Path, **changes: object) -> dict[str, object]:
    config = folder / "custom.yaml"
    config.write_text("turns: 2\nlr: 5.0e-4\n")
    return {
        "custom_config_path": config,
        "custom_generate_function_path": RECIPE + "generate",
        "custom_rm_path": RECIPE + "reward_func",
        "reward_key": "score",
        "rm_type": None,
        "dynamic_sampling_filter_path": RECIPE + "has_spread",
        "rollout_sample_filter_path": RECIPE + "only_full_answers",
        "custom_reward_post_process_path": RECIPE + "normalised",
        "rollout_function_path": "slime.rollout.sglang_rollout.generate_rollout",
        "eval_temperature": 0,
        **changes,
    }


def test_every_function_is_called(start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    losses = {
        "use_tis": True,
        "custom_tis_function_path": RECIPE + "corrected",
        "custom_pg_loss_reducer_function_path": RECIPE + "by_tokens",
    }
    evaluation = {"eval_prompt_data": ["sort", tiny_dense / "eval.jsonl"], "eval_interval": 10}
    given = functions(tmp_path, num_rollout=2, **losses, **evaluation)
    run = start_run(recipe(tiny_dense, tmp_path / "run", **given), tmp_path / "run")
    assert run.wait() == ExitCode.OK, run.output()
    first, second = run.metrics()
    assert first["train/own_ratio"] == pytest.approx(1, abs=1e-3)
    assert first["train/train_rollout_logprob_abs_diff"] < 1e-4
    assert 7 < first["rollout/response_tokens"] / 256 <= 18, "two answers and what is asked between them"
    assert math.isfinite(second["train/loss"])
    assert set(run.summary()["eval"]["before"]) == {"sort"}


@pytest.mark.slow
def test_a_model_learns_by_two_turns_and_a_loss_of_the_users_own(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    losses = {"loss_type": "custom_loss", "custom_loss_function_path": RECIPE + "reinforce"}
    evaluation = {"eval_prompt_data": ["sort", tiny_dense / "eval.jsonl"], "eval_interval": 100}
    given = functions(tmp_path, num_rollout=24, **losses, **evaluation)
    run = start_run(recipe(tiny_dense, tmp_path / "run", **given), tmp_path / "run")
    assert run.wait() == ExitCode.OK, run.output()
    assert run.metrics()[0]["train/own_loss"] == run.metrics()[0]["train/loss"]
    assert run.summary()["eval"]["before"]["sort"] < 0.4
    assert run.summary()["eval"]["after"]["sort"] > 0.6

from __future__ import annotations

import base64
import pathlib

import pytest

from miles.migrate.equivalents import equivalent
from miles.migrate.launch import Launch
from miles.migrate.translation import Translation, translate

NEEDED = [
    "--hf-checkpoint",
    "/m",
    "--prompt-data",
    "/d.jsonl",
    "--label-key",
    "a",
    "--rm-type",
    "math",
    "--num-rollout",
    "1",
]
SCRIPT = pathlib.Path(__file__).parent / "scripts" / "run-tiny.sh"


def translated(*words: str, program: str = "train", **environment: str) -> Translation:
    return translate(Launch(SCRIPT, program, [*NEEDED, *words], environment))


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--lr", "1e-6"], {"--lr": ["1e-6"]}),
        (["--lr", "1", "--lr=2"], {"--lr": ["2"]}),
        (["--rollout-stop", "a", "--rollout-stop", "b"], {"--rollout-stop": ["b"]}),
        (["--sglang-tp-size", "4"], {"--rollout-num-gpus-per-engine": ["4"]}),
        (["--sglang-tp-size", "4", "--rollout-num-gpus-per-engine", "4"], {"--rollout-num-gpus-per-engine": ["4"]}),
        (["--sglang-nsa-decode-backend", "fa3"], {"--sglang-dsa-decode-backend": ["fa3"]}),
        (["--sglang-enable-metrics"], {"--sglang-enable-metrics": []}),
        (["--warmup-ratio", "0.1"], {"--lr-warmup-fraction": ["0.1"]}),
        (["--update-weight-mode", "full"], {}),
        (["--use-miles-router", "--router-policy", "x"], {}),
        (["--num-layers", "3", "--swiglu"], {}),
    ],
)
def test_flags_have_their_names_here(words: list[str], flags: dict[str, list[str]]) -> None:
    result = translated(*words)
    assert {flag: values for flag, values in result.flags.items() if flag not in NEEDED} == flags
    assert result.not_taken == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--http-proxy", "p"], "--http-proxy = p, but services call each other without a proxy; leave it out"),
        (
            ["--nothing-like-it"],
            "--nothing-like-it = true, but there is no such flag; `miles config docs` lists them all",
        ),
        (["--sglang-nothing", "1"], "--sglang-nothing = 1, but SGLang has no such flag"),
        (
            ["--rollout-num-gpus-per-engine", "2", "--sglang-tp-size", "4"],
            "--rollout-num-gpus-per-engine 2 is the setting",
        ),
    ],
)
def test_what_is_not_taken_has_a_reason_and_a_remedy(words: list[str], said: str) -> None:
    (fault,) = translated(*words).not_taken
    assert said in str(fault)


def test_settings_are_checked_together() -> None:
    result = translated("--eval-interval", "3", "--rollout-top-p", "0.5")
    assert any("rollout_top_p = 0.5" in str(fault) for fault in result.faults)


def test_what_is_open_is_kept_and_not_checked() -> None:
    launch = Launch(SCRIPT, "train", NEEDED.copy())
    launch.words += [
        "--rollout-batch-size",
        launch.open.new("$N", "nothing sets it", 1),
        launch.open.new("$MORE", "", 2),
    ]
    result = translate(launch)
    assert (result.flat["rollout_batch_size"], result.faults) == ("$N", [])
    assert "$MORE may have flags of its own: add them" in result.notes


@pytest.mark.parametrize(
    ("program", "words", "bound"),
    [
        ("train", [], None),
        ("train_async", [], ["1"]),
        ("train_async", ["--update-weights-interval", "2"], ["2"]),
        ("train_async", ["--fully-async"], ["2"]),
        ("train_async", ["--rollout-function-path", "x.fully_async_rollout.generate"], ["2"]),
        ("train_async", ["--max-weight-staleness", "5"], ["5"]),
    ],
)
def test_asynchronous_programs_are_a_bound_on_staleness(
    program: str, words: list[str], bound: list[str] | None
) -> None:
    result = translated(*words, program=program)
    assert result.flags.get("--max-weight-staleness") == bound


def test_settings_of_a_file_in_the_command_line_are_flags() -> None:
    text = base64.b64encode(b"use_tis: true\ntis_level: token\nrs_lower_bound: null\n").decode()
    flags = translated("--custom-config-path", f"base64:{text}").flags
    assert (flags["--use-tis"], flags["--tis-level"]) == ([], ["token"])
    assert "--rs-lower-bound" not in flags
    assert translated("--custom-config-path", "scripts/settings.yaml").flags["--tis-upper-bound"] == ["3.0"]
    assert equivalent("--custom-config-path", ["scripts/none.yaml"], lambda _: None) is None


def test_variables_go_to_who_reads_them() -> None:
    result = translated(NCCL_DEBUG="INFO", SGLANG_X="1", RAY_X="2", OTHER="3", NVTE_X="4")
    assert result.flags["--train-env-vars"] == ['{"NCCL_DEBUG": "INFO", "NVTE_X": "4"}']
    assert result.environment.exported == {"SGLANG_X": "1"}
    assert result.environment.left_out == {"RAY_X": "there is no Ray", "OTHER": "nothing here reads it"}
    again = translated("--train-env-vars", '{"NVTE_X": "5"}', NVTE_X="4")
    assert again.flags["--train-env-vars"] == ['{"NVTE_X": "5"}']


@pytest.mark.parametrize(
    ("words", "environment", "flags"),
    [
        (
            ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"],
            {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"},
            {"--fp8-block-scales": ["power_of_two"]},
        ),
        ([], {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}, {}),
        (
            [],
            {"OPEN_TRAINING_INT4_FAKE_QAT_FLAG": "1", "OPEN_TRAINING_INT4_GROUP_SIZE": "32"},
            {"--int4-qat": [], "--int4-group-size": ["32"]},
        ),
        ([], {"OPEN_TRAINING_INT4_FAKE_QAT_FLAG": "0", "OPEN_TRAINING_INT4_GROUP_SIZE": "32"}, {}),
    ],
)
def test_variables_that_choose_a_format_are_flags(
    words: list[str], environment: dict[str, str], flags: dict[str, list[str]]
) -> None:
    result = translated(*words, **environment)
    assert {flag: values for flag, values in result.flags.items() if flag not in [*NEEDED, *words]} == flags
    assert result.environment.left_out.keys() == environment.keys()
    assert result.faults == []

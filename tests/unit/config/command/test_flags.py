from __future__ import annotations

import pathlib

import pytest
from config_cases import MINIMAL

from miles.config import ConfigError, JobConfig
from miles.config.command.flags import parse_command_line, to_command_line

MINIMAL_FLAGS = to_command_line(MINIMAL)


def config(*flags: str) -> JobConfig:
    return parse_command_line([*MINIMAL_FLAGS, *flags]).config()


def faults(*flags: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config(*flags)
    return [str(fault) for fault in error.value.faults]


def test_flags_are_read_by_kind() -> None:
    read = config(
        *("--lr", "1e-5", "--use-kl-loss", "--rollout-stop", "a", "b", "--rollout-stop-token-ids", "1", "2"),
        *("--train-env-vars", '{"A": "1"}', "--disable-grpo-std-normalization", "--no-keep-fp32-master"),
        *("--rollout-top-k", "-1", "--no-save-optim", "--run-dir=--odd"),
    )
    assert read.optimizer.lr == 1e-5
    assert read.algorithm.use_kl_loss
    assert read.rollout.rollout_stop == ("a", "b")
    assert read.rollout.rollout_stop_token_ids == (1, 2)
    assert read.train.train_env_vars == {"A": "1"}
    assert not read.algorithm.grpo_std_normalization
    assert not read.train.keep_fp32_master
    assert read.checkpoint.no_save_optim
    assert read.services.run_dir == "--odd"


def test_a_repeated_list_grows_and_a_repeated_value_is_replaced() -> None:
    read = config("--reward-service", "a=h:1", "--reward-service", "b=h:2", "--lr", "1", "--lr", "2")
    assert read.reward.service_addresses == {"a": "h:1", "b": "h:2"}
    assert read.optimizer.lr == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--rollout-batchsize", "3"],
            "--rollout-batchsize = 3, but there is no such flag; did you mean --rollout-batch-size?",
        ),
        (["--use-tiss"], "--use-tiss = true, but there is no such flag; did you mean --use-tis?"),
        (["--zzz"], "--zzz = true, but there is no such flag; `miles config docs` lists them all"),
        (["--use-tis", "1"], "use_tis = 1, but --use-tis is a switch; write --use-tis alone, or --no-use-tis"),
        (["--lr"], 'lr = "", but --lr takes a value; write --lr FLOAT'),
        (["--lr", "1", "2"], "lr = 1 2, but --lr takes one value; quote it, or give one"),
        (["--use-tis=False"], "use_tis = False, but --use-tis is a switch; write --use-tis alone, or --no-use-tis"),
        (["--no-save", "x"], "save = x, but --no-save takes no value; write --no-save alone, or --save DIR"),
        (["--save="], 'save = "", but it is empty; give one, or leave it out'),
        (["-lr", "3"], '-lr = "", but it is no flag; did you mean --lr?'),
        (
            ["--rollout_batch_size", "3"],
            "--rollout_batch_size = 3, but there is no such flag; did you mean --rollout-batch-size?",
        ),
        (["--tp", "3"], "--tp = 3, but there is no such flag; did you mean --tensor-model-parallel-size?"),
        (["--zz", "3"], "--zz = 3, but there is no such flag; `miles config docs` lists them all"),
        (["--seed", "4k"], "seed = 4k, but it must be a whole number without a unit; write 4000 or 4096"),
        (["--seed", "1e30"], "seed = 1e30, but it must fit into 64 bits; lower it"),
        (["--seed", "1.5"], "seed = 1.5, but it must be a whole number; give one"),
        (["--lr", "nan"], "lr = nan, but it must be a finite number; give one"),
        (
            ["--rollout-stop-token-ids", "1,2"],
            "rollout_stop_token_ids = 1,2, but it must be a whole number; separate values by spaces, not commas",
        ),
        (["--lr=1", "2"], '2 = "", but it belongs to no flag; put its flag in front of it'),
        (["--config"], '--config = "", but it takes one FILE; give one'),
        (["--dry-run", "now"], "--dry-run = now, but it is a switch; leave its value out"),
        (["--rollout-top-p", "x"], "rollout_top_p = x, but it must be a number; give one"),
        (
            ["--rollout-backend", "torch", "--sglang-mem-fraction-static", "0.8"],
            "sglang_mem_fraction_static = 0.8, but rollout_backend = torch has no SGLang servers; set rollout_backend "
            "to sglang, or leave it out",
        ),
    ],
)
def test_a_wrong_flag_is_refused_with_a_way_out(flags: list[str], expected: str) -> None:
    assert faults(*flags) == [expected]


def test_none_as_text_is_no_value_unless_it_is_a_choice() -> None:
    read = config(
        "--save", "none", "--eval-prompt-data", "None", "--lora-rank", "0", "--position-embedding-type", "none"
    )
    assert (read.checkpoint.save, read.eval.eval_prompt_data) == (None, None)
    assert read.architecture.position_embedding_type == "none"
    faults = parse_command_line(["--name", "x", "--lr", "None"]).config
    with pytest.raises(ConfigError, match="lr = None, but it must be a number"):
        faults()


def test_a_setting_of_a_file_can_be_left_out_on_the_command_line(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("rm_type: math\nsave: there\nsglang_mem_fraction_static: 0.5\n")
    read = config(
        *("--config", str(file), "--no-rm-type", "--no-save", "--no-sglang-mem-fraction-static"),
        *("--reward-service", "default=h:1"),
    )
    assert (read.reward.rm_type, read.checkpoint.save, read.rollout.sglang_args) == (None, None, {})
    again = parse_command_line(["--no-save", "--save", "here"])
    assert again.flat == {"save": "here"}


@pytest.mark.parametrize("spelling", ["1000", "1_000", "1e3", "1E3", " 1000 "])
def test_whole_numbers_are_read_as_people_write_them(spelling: str) -> None:
    assert config("--seed", spelling).train.seed == 1000


def test_a_short_flag_for_help_is_help() -> None:
    assert parse_command_line(["-h"]).help


def test_faults_of_flags_files_and_values_come_together(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("rollout_top_p: 3\nlearning_rate: 1\n")
    assert [line.split(" ")[0] for line in faults("--config", str(file), "--lrr", "1", "--gamma", "2")] == [
        "--lrr",
        "learning_rate",
        "rollout_top_p",
        "gamma",
    ]


def test_flags_win_over_files_and_later_files_over_earlier_ones(tmp_path: pathlib.Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("lr: 1e-4\nseed: 1\nuse_kl_loss: true\nrollout_stop: [x]\n")
    second.write_text("seed: 2\nclip_grad: 0.5\n")
    read = config(
        *("--seed", "3", "--no-use-kl-loss", "--rollout-stop", "y"), *("--config", str(first), "--config", str(second))
    )
    assert (read.optimizer.lr, read.train.seed, read.optimizer.clip_grad) == (1e-4, 3, 0.5)
    assert not read.algorithm.use_kl_loss
    assert read.rollout.rollout_stop == ("y",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("lr: 1\nlr: 2\n", "lr is given twice"),
        ("- lr\n", "it must map setting names to values"),
        ("lr: [", "it is not YAML"),
        ("1: 2\n", "its key 1 is not text"),
        ("optimizer: {lr: 1}\n", "optimizer = {"),
        ("rollout-batch-size: 3\n", "did you mean rollout_batch_size?"),
        ("!!python/object/apply:os.system ['true']\n", "it is not YAML"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: pathlib.Path, content: str, expected: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    assert any(expected in fault for fault in faults("--config", str(file)))


def test_a_missing_file_is_refused() -> None:
    assert faults("--config", "/nowhere/x.yaml") == [
        "--config = /nowhere/x.yaml, but it cannot be read (No such file or directory); check the path"
    ]


def test_an_empty_file_says_nothing(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("# nothing\n")
    assert config("--config", str(file)) == config()


def test_help_and_dry_run_are_noticed() -> None:
    line = parse_command_line(["--help", "--dry-run"])
    assert line.help
    assert line.dry_run


SPECULATING = """--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 --sglang-speculative-eagle-topk 1
    --sglang-speculative-num-draft-tokens 4 --sglang-enable-draft-weights-cpu-backup
    --sglang-speculative-draft-model-path /draft"""
STACK = ("--train-backend", "megatron", "--rollout-backend", "sglang")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            "--advantage-estimator grpo --model-name qwen3-30b-a3b --rollout-batch-size 512 --n-samples-per-prompt 8",
            {"model_name": "qwen3-30b-a3b", "rollout_batch_size": 512, "n_samples_per_prompt": 8},
        ),
        (
            "--actor-num-gpus-per-node 8 --rollout-num-gpus 8 --tensor-model-parallel-size 8 "
            "--expert-model-parallel-size 4 --num-rollout 3000",
            {"rollout_num_gpus": 8, "tensor_model_parallel_size": 8, "expert_model_parallel_size": 4},
        ),
        (SPECULATING, {"sglang_speculative_algorithm": "EAGLE", "sglang_speculative_num_steps": "3"}),
        (
            "--mtp-num-layers 1 --enable-mtp-training --mtp-loss-scaling-factor 0.2",
            {"mtp_num_layers": 1, "enable_mtp_training": True, "mtp_loss_scaling_factor": 0.2},
        ),
        (
            "--actor-num-nodes 1 --actor-num-gpus-per-node 8 --rollout-num-gpus 8 --rollout-num-gpus-per-engine 2 "
            "--colocate",
            {"actor_num_gpus_per_node": 8, "rollout_num_gpus_per_engine": 2, "colocate": True},
        ),
    ],
    ids=["quick start", "experts", "speculation", "mtp", "cluster"],
)
def test_the_flags_of_recipes_are_taken_with_their_stack(recipe: str, expected: dict[str, object]) -> None:
    flat = config(*STACK, *recipe.split()).to_flat()
    assert {key: flat[key] for key in expected} == expected

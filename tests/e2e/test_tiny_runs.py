"""Whole runs of tiny models: they learn, reproducibly, also through crashes and interruptions."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pytest
import torch
from held_rewards import HeldRewards, held_rewards
from safetensors import safe_open
from safetensors.numpy import load_file
from serving_cluster import serving, wait_for
from whole_runs import Records, Run, left_of, recipe, runs_of_test, settings

from miles.client import MilesClient
from miles.client.commands import check_samples
from miles.drafts.folders import checkpoint_dir
from miles.rpc import ExitCode
from miles.services.trainer.convert import main as convert
from miles.services.trainer.drafts import checkpoint
from miles.telemetry.trace_budget import budget
from miles.telemetry.trace_files import read_trace
from miles.types.stored import read_groups

STEPS = 24
Start = Callable[[list[str], pathlib.Path], Run]


EVALUATION = {"eval_interval": 10, "eval_temperature": 0}


@pytest.fixture(scope="module")
def services(
    tiny_dense: pathlib.Path, tiny_moe: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MilesClient]:
    """A client of `miles serve`, for jobs that learn one after the other in the same processes."""
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, tiny_dense, "--gateway-allowed-root", str(tiny_moe)) as client:
        yield client


def learn(client: MilesClient, folder: pathlib.Path, name: str, **changes: object) -> Records:
    """A job that has succeeded."""
    evaluation = {"eval_prompt_data": ["sort", str(folder / "eval.jsonl")], **EVALUATION}
    config = settings(folder, name=name, num_rollout=STEPS, **evaluation, **changes)
    config |= {key: str(config[key]) for key in ("hf_checkpoint", "prompt_data")}
    job_id = client.submit(config)["id"]
    job = wait_for(client, job_id, lambda job: job["state"] == "succeeded")
    return Records(pathlib.Path(job["config"]["run_dir"]))


def assert_learned(run: Records) -> None:
    summary = run.summary()
    assert summary["steps"] == STEPS
    assert summary["eval"]["before"]["sort"] < 0.4
    assert summary["eval"]["after"]["sort"] > 0.8
    assert set(summary["time_share"]) == {"generate", "reward", "train", "sync", "idle"}
    first = run.metrics()[0]
    assert abs(first["train/ppo_kl"]) < 1e-9
    assert first["train/pg_clipfrac"] == 0
    assert first["train/train_rollout_logprob_abs_diff"] < 1e-4


def assert_traced(run_dir: pathlib.Path, step: int) -> None:
    """The trace of a step has every part of a step, and the processes whose parts they are."""
    trace = read_trace(run_dir, step)
    assert list(trace.phases) == ["collect", "train", "publish"]
    found = {(row.process, row.name): row.busy_s for row in budget(trace)}
    assert {process for process, _ in found} == {"controller", "reward-0", "rollout-0", "trainer-0", "weightsync"}
    for process, name, phase in (
        ("rollout-0", "engine request", "collect"),
        ("reward-0", "score a request", "collect"),
        ("rollout-0", "put group", "collect"),
        ("trainer-0", "collect groups", "train"),
        ("trainer-0", "forward and backward", "train"),
        ("trainer-0", "optimizer step", "train"),
        ("trainer-0", "send weights", "publish"),
        ("rollout-0", "swap weights", "publish"),
    ):
        assert found[process, name][phase] > 0, (process, name)


def test_a_dense_model_learns(start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = {"path": str(tiny_dense / "eval.jsonl")}
    short = {
        **data,
        "max_response_len": 3,
        "temperature": 1.0,
        "n_samples_per_eval_prompt": 2,
        "rm_type": "last_number",
    }
    (tmp_path / "eval.yaml").write_text(json.dumps({"eval": {"datasets": {"sort": data, "short": short}}}))
    evaluation = {"eval_config": tmp_path / "eval.yaml", "log_passrate": True, **EVALUATION}
    traced = {"trace_steps": [1, STEPS - 1], **evaluation}
    run = start_run(recipe(tiny_dense, tmp_path / "run", num_rollout=STEPS, **traced), tmp_path / "run")
    assert run.wait() == ExitCode.OK, run.output()
    assert_learned(run)
    assert_traced(run.run_dir, 1)
    assert_traced(run.run_dir, STEPS - 1)
    assert (run.run_dir / "reward.png").stat().st_size > 0
    assert "on this machine: about" in run.log.read_text()
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = next(line for line in lines if line.get("eval/short/weight_version") == STEPS)
    assert evaluated["eval/short/response_len/mean"] == 3 < evaluated["eval/sort/response_len/mean"]
    assert 0 == evaluated["eval/short"] <= evaluated["passrate/short/pass@2"]
    assert "passrate/sort/pass@1" not in evaluated
    assert [line["passrate/pass@1"] for line in run.metrics()] == pytest.approx(
        [line["rollout/raw_reward"] for line in run.metrics()]
    )


def saved_steps(client: MilesClient, job_id: str) -> set[int]:
    return {checkpoint["step"] for checkpoint in client.checkpoints(job_id)}


def test_a_trainer_that_leaves_between_its_steps_trains_the_same(
    services: MilesClient, tiny_dense: pathlib.Path
) -> None:
    """Through checkpoints, evaluations, and a checkpoint of a paused job."""
    evaluation = {"eval_prompt_data": ["sort", str(tiny_dense / "eval.jsonl")], "eval_interval": 5}

    def submitted(name: str, **changes: object) -> tuple[str, Records]:
        config = settings(tiny_dense, name=name, num_rollout=10, save_interval=4, **evaluation, **changes)
        config |= {key: str(config[key]) for key in ("hf_checkpoint", "prompt_data")}
        job = services.submit(config)
        return job["id"], Records(pathlib.Path(job["config"]["run_dir"]))

    job_id, stays = submitted("stays")
    wait_for(services, job_id, lambda job: job["state"] == "succeeded")
    job_id, leaves = submitted("leaves", offload_train=True)
    wait_for(services, job_id, lambda job: job["policy_version"] >= 1)
    services.pause(job_id)
    paused = wait_for(services, job_id, lambda job: job["state"] == "paused")
    services.checkpoint(job_id)
    wait_for(services, job_id, lambda _: paused["policy_version"] in saved_steps(services, job_id))
    services.resume(job_id)
    wait_for(services, job_id, lambda job: job["state"] == "succeeded")
    for step, (one, other) in enumerate(zip(stays.metrics(), leaves.metrics(), strict=True)):
        assert one["train/loss"] == other["train/loss"], step
        assert ("perf/offload_train_time" in other, "perf/offload_train_time" in one) == (True, False)
        assert other["perf/offload_train_gb"] > 0
        assert other["perf/onload_train_time"] > 0
    assert stays.summary()["eval"] == leaves.summary()["eval"]
    assert all(np.array_equal(tensor, leaves.weights()[name]) for name, tensor in stays.weights().items())


def test_what_a_turn_leaves_over_waits_for_the_next(services: MilesClient, tiny_dense: pathlib.Path) -> None:
    """Surplus groups are begun and preempted, and no group is generated while the trainer has its turn."""
    config = settings(tiny_dense, name="turns", num_rollout=6, colocate=True, offload_train=True, save_interval=3)
    config |= {"offload_rollout": False, "partial_rollout": True, "trace_steps": [2, 3, 4]}
    config |= {"use_wandb": True, "wandb_mode": "offline", "use_mlflow": True, "use_tensorboard": True}
    config["over_sampling_batch_size"] = 2 * config["rollout_batch_size"]
    config |= {key: str(config[key]) for key in ("hf_checkpoint", "prompt_data")}
    job = services.submit(config)
    wait_for(services, job["id"], lambda job: job["state"] == "succeeded")
    records = Records(pathlib.Path(job["config"]["run_dir"]))
    staleness = [line["rollout/fully_async/max_staleness"] for line in records.metrics()]
    assert len(staleness) == 6
    assert set(staleness) == {0, 1}
    requests = 0
    for step in config["trace_steps"]:  # one of them may live on what was left over alone
        processes = read_trace(records.run_dir, step).processes
        generating = [span for span in processes["rollout-0"] if span.name == "engine request"]
        [training] = [span for span in processes["controller"] if span.name == "train call"]
        assert not [span for span in generating if span.begin_ns < training.end_ns and training.begin_ns < span.end_ns]
        requests += len(generating)
    assert requests
    assert list((records.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert list((records.run_dir / "tensorboard" / "turns").iterdir())
    assert (records.run_dir / "mlflow" / "mlflow.db").stat().st_size > 0


def test_each_half_of_a_run_runs_alone(services: MilesClient, tiny_dense: pathlib.Path) -> None:
    """Training on dumped rollouts gives the weights of the run that wrote them; generation needs no trainer."""
    small = {"num_rollout": 2, "rollout_batch_size": 4, "n_samples_per_prompt": 4}

    def done(name: str, **changes: object) -> Records:
        config = settings(tiny_dense, name=name, run_dir=str(tiny_dense / "runs" / name), **{**small, **changes})
        config |= {key: str(config[key]) for key in ("hf_checkpoint", "prompt_data")}
        job_id = services.submit(config)["id"]
        wait_for(services, job_id, lambda job: job["state"] == "succeeded")
        return Records(tiny_dense / "runs" / name)

    dump = tiny_dense / "runs" / "dumped" / "dump"
    norms = str(dump / "norms" / "{role}_{rollout_id}_{step_id}.pt")
    dumped = done("dumped", dump_details=str(dump), ci_save_grad_norm=norms)
    recorded = str(dump / "rollout_data" / "{rollout_id}.pt")
    trained = done("trained", load_debug_rollout_data=recorded, ci_load_grad_norm=norms)
    assert all(np.array_equal(tensor, trained.weights()[name]) for name, tensor in dumped.weights().items())
    assert [line["train/loss"] for line in trained.metrics()] == [line["train/loss"] for line in dumped.metrics()]
    assert (dump / "metrics.jsonl").read_text() == (dumped.run_dir / "metrics.jsonl").read_text()

    data = torch.load(dump / "train_data" / "1_0.pt", weights_only=True)
    assert len(data["samples"]) == 16
    assert {len(sample["advantages"]) - sample["response_length"] for sample in data["samples"]} == {0}

    own = tiny_dense / "runs" / "generated"
    generated = done("generated", debug_rollout_only=True, save_debug_rollout_data=str(own / "{rollout_id}.pt"))
    first, again = (list(read_groups(folder / "0.pt")) for folder in (dump / "rollout_data", own))
    assert [group.samples for group in first] == [group.samples for group in again]
    assert {group.oldest_version for group in read_groups(own / "1.pt")} == {0}
    assert len(generated.metrics()) == 2
    assert "hf_checkpoint" not in generated.summary()

    half = done("half", load_debug_rollout_data=recorded, load_debug_rollout_data_subsample=0.5,
                debug_exit_after_rollout=1, rollout_batch_size=2)  # fmt: skip
    assert [line["rollout/samples"] for line in half.metrics()] == [8]


@pytest.mark.slow
def test_a_dense_model_learns_with_a_critic(services: MilesClient, tiny_dense: pathlib.Path) -> None:
    ppo = {"advantage_estimator": "ppo", "critic_lr": 1e-3, "normalize_advantages": True, "num_critic_only_steps": 2}
    run = learn(services, tiny_dense, "critic", **ppo)
    summary = run.summary()
    assert summary["eval"]["before"]["sort"] < 0.4
    assert summary["eval"]["after"]["sort"] > 0.6
    losses = [line["train/value_loss"] for line in run.metrics()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_model_learns_from_several_rewards_with_a_soft_gate(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the rewards are in tests/support
    rewards = {"custom_rm_path": "sorting_rewards.right_and_close", "rm_type": None, "reward_key": "right"}
    gdpo = {"advantage_estimator": "gdpo", "gdpo_rewards": ["right", "placed=0.5"], **rewards}
    sapo = {"policy_loss_type": "sapo", "num_steps_per_rollout": 2}
    run = start_run(recipe(tiny_dense, tmp_path / "run", num_rollout=10, **gdpo, **sapo), tmp_path / "run")
    assert run.wait() == ExitCode.OK, run.output()
    lines = run.metrics()
    assert sum(line["rollout/raw_reward"] for line in lines[-2:]) > sum(
        line["rollout/raw_reward"] for line in lines[:2]
    )
    assert all(line["rollout/reward/placed"] > line["rollout/reward/right"] for line in lines[:3])
    assert 0 < lines[-1]["train/sapo_weight"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"advantage_estimator": "optimal_token_baseline", "policy_loss_type": "dppo_tv", "use_rollout_logprobs": True},
        {"advantage_estimator": "maxrl", "policy_loss_type": "dppo_kl", "num_steps_per_rollout": 2},
        {"policy_loss_type": "gmpo", "num_steps_per_rollout": 2},
        {"policy_loss_type": "luspo", "calculate_per_token_loss": False, "eps_clip": 0.2, "lr": 2e-4},
        {"policy_loss_type": "vespo", "num_steps_per_rollout": 2},
        {"policy_loss_type": "dro", "dro_beta": 0.05, "num_steps_per_rollout": 2},
    ],
    ids=lambda changes: "-".join(str(changes[key]) for key in changes if key.endswith(("estimator", "loss_type"))),
)
def test_a_model_learns_with_other_estimators_and_losses(
    services: MilesClient, tiny_dense: pathlib.Path, changes: dict[str, object]
) -> None:
    run = learn(services, tiny_dense, "-".join(["other", *map(str, list(changes.values())[:1])]), **changes)
    assert run.summary()["eval"]["after"]["sort"] > 0.6 > run.summary()["eval"]["before"]["sort"]


def test_a_mixture_of_experts_learns_with_routing_replay(services: MilesClient, tiny_moe: pathlib.Path) -> None:
    run = learn(services, tiny_moe, "experts", use_rollout_routing_replay=True, log_whole_samples=True)
    assert_learned(run)
    stored = [str(run.run_dir), "--hf-checkpoint", str(tiny_moe / "model"), "--needs-routing"]
    assert check_samples.main(stored) == ExitCode.OK
    assert all(step["train/tokens_routed_differently"] == 0 for step in run.metrics())


LOW_PRECISION = [
    pytest.param({"fp8_format": "e4m3", "fp8_recipe": "blockwise"}, id="fp8_block"),
    pytest.param({"int4_qat": True, "int4_group_size": 32, "int4_layers": ["."]}, id="int4"),
    pytest.param({"fp8_format": "e4m3", "fp8_recipe": "mxfp8"}, id="mxfp8", marks=pytest.mark.slow),
    pytest.param({"fp4_format": "e2m1", "fp4_recipe": "nvfp4"}, id="nvfp4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", LOW_PRECISION)
def test_a_mixture_of_experts_learns_in_low_precision_without_mismatch(
    services: MilesClient, tiny_moe: pathlib.Path, changes: dict[str, object]
) -> None:
    """The engine computes by the weights that it was sent in the format, and the trainer by the same function."""
    replay = {"use_rollout_routing_replay": True, "check_weight_update_equal": True}
    run = learn(services, tiny_moe, "low-precision", **replay, **changes)
    assert_learned(run)
    for key in ("train_rollout_logprob_abs_diff", "train_rollout_logprob_abs_diff_max", "tokens_routed_differently"):
        assert {line[f"train/{key}"] for line in run.metrics()} == {0.0}, key
    whole_gb = (tiny_moe / "model" / "model.safetensors").stat().st_size / 1e9
    assert all(line["perf/update_weights_gb"] < 0.4 * whole_gb for line in run.metrics())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("conversion", "training"),
    [
        (["hf-to-fp8"], {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}),
        (["hf-to-int4", "--int4-group-size", "32"], {"int4_qat": True}),
    ],
    ids=["fp8", "int4"],
)
def test_a_run_starts_from_a_folder_in_its_format_and_the_next_from_its_export(
    services: MilesClient, tiny_moe: pathlib.Path, conversion: list[str], training: dict[str, object]
) -> None:
    source = tiny_moe / conversion[0]
    direction, *options = conversion
    plain = ["--hf-checkpoint", str(tiny_moe / "model"), "--dtype", "float32"]
    assert convert([direction, *options, *plain, "--save", str(source)]) == 0
    for turn in range(2):
        config = settings(tiny_moe, name=f"{direction}-{turn}", num_rollout=2, save_hf_format="rollout", **training)
        config |= {"use_rollout_routing_replay": True, "check_weight_update_equal": True}
        config |= {"hf_checkpoint": str(source), "prompt_data": str(config["prompt_data"])}
        job = wait_for(services, services.submit(config)["id"], lambda job: job["state"] == "succeeded")
        run_dir = pathlib.Path(job["config"]["run_dir"])
        assert [step["train/train_rollout_logprob_abs_diff"] for step in Records(run_dir).metrics()] == [0.0] * 2
        (export,) = (run_dir / "hf").iterdir()
        names = []
        for each in (source, export):
            with safe_open(each / "model.safetensors", "pt") as file:
                names.append(set(file.keys()))
        assert names[0] == names[1]
        assert any(name.endswith(("_packed", "_scale_inv")) for name in names[1])
        stated = [json.loads((each / "config.json").read_text())["quantization_config"] for each in (source, export)]
        assert stated[0] == stated[1]
        source = tiny_moe / f"{direction}-{turn}-export"
        shutil.copytree(export, source)


def test_an_adapter_learns_over_updates_of_an_adapter_alone(services: MilesClient, tiny_dense: pathlib.Path) -> None:
    run = learn(services, tiny_dense, "adapter", lora_rank=8, lr=3e-3, check_weight_update_equal=True)
    assert_learned(run)
    # The engine's merged weights are the trainer's, bit for bit.
    assert {line["train/train_rollout_logprob_abs_diff"] for line in run.metrics()} == {0.0}
    base, trained = load_file(tiny_dense / "model" / "model.safetensors"), run.weights()
    changed = {name for name in base if not np.array_equal(base[name], trained[name])}
    assert changed == {name for name in base if "_proj" in name}


def test_one_step_off_learns_within_its_staleness_bound(services: MilesClient, tiny_dense: pathlib.Path) -> None:
    run = learn(services, tiny_dense, "one-step-off", max_weight_staleness=1, keep_old_actor=True)
    # Which groups share a step depends on what finishes first, so that no two runs end alike.
    assert run.summary()["eval"]["after"]["sort"] > 0.6
    staleness = [line["rollout/fully_async/max_staleness"] for line in run.metrics()]
    assert max(staleness) == 1
    # The version that generated a token gives it the log-probability that the engine gave it.
    assert max(line["train/old_actor_ratio"] for line in run.metrics()) > 0.5
    assert max(line["train/train_rollout_logprob_abs_diff"] for line in run.metrics()) < 1e-4


@pytest.fixture(scope="module")
def short() -> dict[str, object]:
    """A run of few steps that saves on the way."""
    return {"num_rollout": 9, "save_interval": 3, "rollout_batch_size": 4, "n_samples_per_prompt": 8}


def equal(left: Records, right: Records) -> bool:
    one, other = left.weights(), right.weights()
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(
    tiny_dense: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, short: dict[str, object]
) -> Iterator[Run]:
    """The short run when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    with runs_of_test(folder) as start:
        run = start(recipe(tiny_dense, folder / "run", **short), folder / "run")
        assert run.wait() == ExitCode.OK, run.output()
        yield run


def test_same_seed_same_tokens_even_when_the_trainer_is_killed(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, short: dict[str, object], whole: Run
) -> None:
    """Equal final weights, bit for bit, mean equal tokens, rewards and gradients all along."""
    broken = start_run(recipe(tiny_dense, tmp_path / "broken", **short), tmp_path / "broken")
    broken.wait_for_step(5)
    broken.processes()["trainer-0"].send_signal(signal.SIGKILL)
    assert broken.wait() == ExitCode.OK, broken.output()
    assert "recovering" in broken.log.read_text()
    assert [line["rollout/raw_reward"] for line in whole.metrics()] == [
        line["rollout/raw_reward"] for line in broken.metrics()
    ]
    assert equal(whole, broken)


@pytest.fixture
def rewards(tmp_path: pathlib.Path) -> Iterator[HeldRewards]:
    """Those of `settings`, in the steps that the test does not hold."""
    (tmp_path / "held").mkdir()
    with held_rewards(tmp_path / "held", "exact") as found:
        yield found


def test_killing_the_draft_trainer_changes_nothing_but_acceptance(
    services: MilesClient, tiny_dense: pathlib.Path, short: dict[str, object], whole: Run, rewards: HeldRewards
) -> None:
    """The same tokens as without any drafts."""
    standalone = {"algorithm": "STANDALONE", "draft_model_path": str(tiny_dense / "model")}
    drafted = with_killed_draft_trainer(services, tiny_dense, rewards, short, standalone)
    assert_same_but_drafts(whole, drafted)


@pytest.mark.slow
def test_a_head_from_nothing_changes_nothing_but_acceptance(
    services: MilesClient, tiny_dense: pathlib.Path, short: dict[str, object], rewards: HeldRewards
) -> None:
    """EAGLE-3 reads hidden states between layers, of which the tiny model has too few."""
    folder = deepened(tiny_dense, tiny_dense / "deep")
    config = settings(folder, name="plain", **short)
    config |= {key: str(config[key]) for key in ("hf_checkpoint", "prompt_data")}
    job = services.submit(config)
    wait_for(services, job["id"], lambda job: job["state"] == "succeeded")
    drafted = with_killed_draft_trainer(services, folder, rewards, short, {"algorithm": "EAGLE3"})
    assert_same_but_drafts(Records(pathlib.Path(job["config"]["run_dir"])), drafted)
    assert (drafted.run_dir / "drafts" / "initial" / "config.json").is_file()


def with_killed_draft_trainer(
    services: MilesClient,
    folder: pathlib.Path,
    rewards: HeldRewards,
    short: dict[str, object],
    speculative: dict[str, str],
) -> Records:
    """A job whose draft trainer was killed twice; held before, as its steps take less time than a start does."""
    training = {"enable_draft_training": True, "draft_batch_tokens": 512, "draft_recordings_kept": 9}
    flags = {f"sglang_speculative_{name}": value for name, value in speculative.items()}
    changes = {"rollout_backend": "torch", **short, **training, **flags, **rewards.settings}
    config = settings(folder, name="drafted", **changes)
    config |= {key: str(config[key]) for key in ("hf_checkpoint", "prompt_data")}
    held = (1, 4)
    rewards.hold(*held)
    job = services.submit(config)
    run = Records(pathlib.Path(job["config"]["run_dir"]))
    for step in held:
        wait_for_draft(run.run_dir, step - 1)
        (trainer,) = [worker for worker in services.workers() if worker["kind"] == "draft_trainer"]
        psutil.Process(trainer["info"]["pid"]).kill()
        rewards.release(step)
    wait_for(services, job["id"], lambda job: job["state"] == "succeeded")
    events = [event["text"] for event in services.watch(job["id"], follow=False) if event["type"] == "log"]
    assert any("draft-trainer-0 is lost, and the run goes on" in text for text in events)
    return run


def assert_same_but_drafts(plain: Records, drafted: Records) -> None:
    assert [line["rollout/raw_reward"] for line in drafted.metrics()] == [
        line["rollout/raw_reward"] for line in plain.metrics()
    ]
    assert equal(plain, drafted)
    last = drafted.metrics()[-1]
    assert last["draft/version"] >= 1
    assert last["draft/missed_recordings"] == 0


def deepened(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The tiny model with two layers more, which begin without an effect."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source / "model")
    config.num_hidden_layers += 2
    config.layer_types = config.layer_types + config.layer_types[-2:]
    state = AutoModelForCausalLM.from_pretrained(source / "model").state_dict()
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        for layer in model.model.layers[-2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source / "model").save_pretrained(folder / "model")
    shutil.copy(source / "train.jsonl", folder)
    return folder


def wait_for_draft(run_dir: pathlib.Path, step: int) -> int:
    """Wait until a draft is saved that has learned from a step; return the last that it has learned from."""
    end = time.monotonic() + 400
    while True:
        found = checkpoint.load(checkpoint_dir(run_dir))
        if found is not None and found[0].recorded_step >= step:
            assert found[0].version == found[0].recordings == found[0].recorded_step + 1
            return found[0].recorded_step
        assert time.monotonic() < end, f"no draft has learned from step {step}: {found and found[0]}"
        time.sleep(0.05)


def test_an_interrupted_run_leaves_nothing_running_and_resumes_to_the_same_weights(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, short: dict[str, object], whole: Run
) -> None:
    command, run_dir = recipe(tiny_dense, tmp_path / "cut", **short), tmp_path / "cut"
    cut = start_run(command, run_dir)
    cut.wait_for_step(4)
    family = cut.family()
    cut.process.send_signal(signal.SIGINT)
    assert cut.wait(200) == ExitCode.INTERRUPTED, cut.output()
    assert left_of(family) == []
    resumed = start_run(command, run_dir)
    assert resumed.wait() == ExitCode.OK, resumed.output()
    assert equal(whole, resumed)
    again = start_run(command, run_dir)
    assert again.wait() == ExitCode.OK, again.output()
    assert "9 steps" in again.log.read_text()


def test_killing_the_launcher_leaves_no_service_running(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, short: dict[str, object]
) -> None:
    run_dir = tmp_path / "run"
    command = recipe(tiny_dense, run_dir, **short)
    run = start_run(command, run_dir)
    run.wait_for_step(2)
    services = run.processes()
    redis = services.pop("redis")
    run.process.kill()
    _, left = psutil.wait_procs(services.values(), timeout=60)
    assert left == []
    resumed = start_run(command, run_dir)
    assert resumed.wait() == ExitCode.OK, resumed.output()
    assert not redis.is_running()

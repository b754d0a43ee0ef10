from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from config_cases import MINIMAL

from miles import cli
from miles.config import JobConfig
from miles.config.command.flags import to_command_line
from miles.config.command.yaml_files import read_file
from miles.launcher import plan
from miles.launcher.placement import placement_of
from miles.launcher.plan import plan_controller, plan_redis, plan_run, plan_workers
from miles.placement.deal import NoRoomError
from miles.placement.nodes import parse_cluster

ROOT = pathlib.Path(__file__).parents[3]


def test_the_reference_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "docs", "--check", "--out", str(ROOT / "docs" / "configuration.md")]) == 0


def test_a_stale_reference_page_is_noticed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "configuration.md"
    assert cli.main(["config", "docs", "--check", "--out", str(page)]) == 1
    assert cli.main(["config", "docs", "--out", str(page)]) == 0
    assert cli.main(["config", "docs", "--check", "--out", str(page)]) == 0
    page.write_text(page.read_text().replace("--lr`", "--learning-rate`"))
    assert cli.main(["config", "docs", "--check", "--out", str(page)]) == 1
    assert "is not up to date" in capsys.readouterr().err


def test_another_file_is_not_written_over(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "train.py"
    other.write_text("print()")
    assert cli.main(["config", "docs", "--out", str(other)]) == 1
    assert other.read_text() == "print()"
    assert "something else than this page" in capsys.readouterr().err


def test_show_prints_settings_that_read_back(files: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", *to_command_line(MINIMAL), "--device", "cpu", "--lr", "3e-5"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert JobConfig.from_flat(printed) == JobConfig.from_flat(MINIMAL | {"lr": 3e-5}).resolve("cpu").replace(
        device="cpu"
    )


def test_show_lists_every_fault_with_those_of_the_machine(
    files: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = to_command_line(MINIMAL | {"hf_checkpoint": "no", "prompt_data": "no.jsonl", "device": "cpu"})
    assert (
        cli.main(["config", "show", *flags, "--lrr", "1", "--rollout-top-p", "7", "--actor-num-gpus-per-node", "5"])
        == 2
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "--lrr",
        "rollout_top_p",
        "global_batch_size",
        "hf_checkpoint",
        "prompt_data",
    ]


def test_dry_run_lists_every_process_and_leaves_nothing_behind(
    files: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(files.rglob("*"))
    flags = to_command_line(
        MINIMAL
        | {"rollout_num_workers": 2, "actor_num_gpus_per_node": 2, "device": "cpu", "reward_service": ["code=h:9"]}
    )
    assert cli.main(["config", "show", "--dry-run", *flags]) == 0
    described: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    names = [process["name"] for process in described["processes"]]
    assert names[:4] == ["redis", "controller", "weightsync", "reward-0"]
    assert names[4:] == ["rollout-0", "rollout-1", "trainer-0", "gateway"]
    processes = {process["name"]: process for process in described["processes"]}
    assert "rollout_temperature" not in described["settings"]
    assert described["settings"]["rm_type"] == "math"
    assert "torch.distributed.run --nproc-per-node 2" in processes["trainer-0"]["command"]
    assert described["settings"]["global_batch_size"] == 32
    assert described["settings"]["distributed_backend"] == "gloo"
    assert described["runs elsewhere"] == {"reward service code": "h:9"}
    assert sorted(files.rglob("*")) == before


def test_dry_run_fits_on_a_screen_or_two_and_tells_no_secret(
    files: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = to_command_line(MINIMAL | {"device": "cpu", "redis_url": "redis://:hunter2@h:1/0"})
    assert cli.main(["config", "show", "--dry-run", *flags, "--train-env-vars", '{"WANDB_KEY": "hunter3"}']) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 80
    assert "hunter" not in printed


def test_dry_run_starts_no_process_and_opens_no_connection(files: pathlib.Path) -> None:
    program = """
import sys
def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "socket.connect", "socket.listen"):
        raise SystemExit(f"the dry run did {event}{arguments}")
sys.addaudithook(refuse)
from miles.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(code)
"""
    flags = to_command_line(MINIMAL | {"controller_port": 0, "train_dtype": "float32"})
    ran = subprocess.run(
        [sys.executable, "-c", program, "config", "show", "--dry-run", "--device", "cpu", *flags],
        cwd=files,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert "trainer-0" in ran.stdout


def test_dry_run_says_which_backends_were_chosen_and_what_changes_nothing(
    files: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*to_command_line(MINIMAL), "--train-dtype", "float32", "--device", "cpu"]
    assert cli.main(["config", "show", "--dry-run", *flags, "--gradient-checkpointing", "--enable-experimental"]) == 0
    described = yaml.safe_load(capsys.readouterr().out)
    assert described["chosen here"] == [
        "train_backend = fsdp: only fsdp has gradient_checkpointing",
        "rollout_backend = torch: the device is a CPU",
    ]
    assert described["accepted with a note"] == [
        "enable_experimental = true: it changes nothing: features of Megatron-Core that need permission are not used"
    ]
    assert cli.main(["config", "show", "--dry-run", *flags, "--train-backend=fsdp", "--rollout-backend=torch"]) == 0
    assert "chosen here" not in yaml.safe_load(capsys.readouterr().out)


def test_dry_run_says_which_number_types_are_chosen_and_why(
    files: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def types(*flags: str) -> str:
        command = ["config", "show", "--dry-run", *to_command_line(MINIMAL), "--device", "cpu", *flags]
        assert cli.main(command) == 0
        return str(yaml.safe_load(capsys.readouterr().out)["number types"])

    slowdown = r"a bfloat16 matrix product takes [\d.]+ times as long as a float32 one on this machine"
    chosen = re.fullmatch(rf"the trainer computes in (\w+), engines in (\w+): {slowdown}", types())
    assert chosen is not None
    assert chosen[1] == chosen[2]
    assert types("--rollout-dtype", "float32") == (
        "the trainer computes in float32, engines in float32: the trainer follows rollout_dtype"
    )


def test_processes_of_a_kind_share_the_cores_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "usable_cores", lambda: 8)
    spread = {"actor_num_gpus_per_node": 4, "rollout_num_workers": 2, "controller_port": 7000}
    config = JobConfig.from_flat(MINIMAL | spread).resolve("cpu")

    def threads() -> dict[str, str | None]:
        return {each.kind: each.environment.get("OMP_NUM_THREADS") for each in plan.plan_run(config)}

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shares = {"trainer": "2", "rollout": "4", "reward": "1"}
    assert {kind: share for kind, share in threads().items() if share is not None} == shares
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert set(threads().values()) == {None}


def test_processes_with_tensors_on_the_cpu_keep_freed_memory_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    settings = MINIMAL | {"controller_port": 7000}
    config = JobConfig.from_flat(settings).resolve("cpu")

    def tuned(config: JobConfig) -> dict[str, str | None]:
        return {plan.kind: plan.environment.get("GLIBC_TUNABLES") for plan in plan_run(config)}

    kinds = {kind for kind, value in tuned(config).items() if value and "glibc.malloc.mmap_max=0" in value}
    assert kinds == {"rollout", "trainer"}
    own = config.replace(train_env_vars={"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
    assert tuned(own)["trainer"] == "glibc.malloc.arena_max=2"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=4")
    assert set(tuned(config).values()) == {None}


def test_plans_carry_addresses_once_they_are_known() -> None:
    config = JobConfig.from_flat(
        MINIMAL
        | {"controller_port": 7000, "rollout_port": 7100, "rollout_num_workers": 3, "rm_type": None}
        | {"custom_rm_path": "a.b", "group_rm": True, "train_env_vars": {"A": "1"}}
    ).resolve("cpu")
    controller = plan_controller(config, "redis://:secret@r")
    assert controller.command[-2:] == ("--listen", "127.0.0.1:7000")
    assert controller.environment["MILES_REDIS_URL"] == "redis://:secret@r"  # not in the list of processes
    plans = {plan.name: plan for plan in plan_workers(config, "c:1")}
    assert [plans[f"rollout-{i}"].command[4] for i in range(3)] == [f"127.0.0.1:{7100 + i}" for i in range(3)]
    assert all(plan.command[5:7] == ("--controller", "c:1") for plan in plans.values())
    assert plans["reward-0"].command[-3:] == ("--custom-rm-path", "a.b", "--group-rm")
    assert plans["trainer-0"].environment["A"] == "1"
    assert plans["trainer-0"].command[1:3] == ("-m", "miles.services.trainer")
    ranks = config.replace(
        trainer_master_port=77, actor_num_gpus_per_node=4, global_batch_size=None, rollout_batch_size=8
    )
    trainer = plan_workers(ranks, "c:1")[-1]
    assert trainer.command[1:5] == ("-m", "torch.distributed.run", "--nproc-per-node", "4")
    assert trainer.command[trainer.command.index("--master-port") + 1] == "77"
    assert trainer.command[9:11] == ("-m", "miles.services.trainer")


def test_rollouts_take_the_gpus_after_the_trainers() -> None:
    flat = MINIMAL | {"actor_num_gpus_per_node": 2, "rollout_num_workers": 2}

    def devices(cluster: str, **changes: Any) -> list[tuple[int, str]]:
        config = JobConfig.from_flat(flat | changes).resolve("cuda")
        placement = placement_of(config, parse_cluster(cluster))
        plans = plan_workers(config, "c:1", placement=placement)
        return [(plan.node, plan.command[-3]) for plan in plans if plan.kind == "rollout"]

    assert devices("4") == [(0, "cuda:2"), (0, "cuda:3")]
    assert devices("3,1") == [(0, "cuda:2"), (1, "cuda:0")]
    assert devices("2", colocate=True, offload_rollout=False) == [(0, "cuda:0"), (0, "cuda:1")]
    with pytest.raises(NoRoomError, match="the trainer's 2 leave 1 of the 3 GPUs"):
        devices("3")


def test_example_configurations_are_valid() -> None:
    examples = sorted((ROOT / "examples").rglob("*.yaml"))
    assert examples
    for example in examples:
        flat, faults = read_file(str(example))
        assert faults == []
        JobConfig.from_flat(flat)


def test_services_that_run_elsewhere_are_not_planned() -> None:
    config = JobConfig.from_flat(
        MINIMAL | {"redis_url": "redis://r:1", "rm_type": None, "reward_service": ["default=h:1"]}
    ).resolve("cpu")
    assert plan_redis(config) is None
    assert {plan.kind for plan in plan_run(config)} == {"controller", "weightsync", "rollout", "trainer", "gateway"}


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    from miles.config.schema.catalog import catalog

    assert cli.main(["config", "show", "--help"]) == 0
    printed = capsys.readouterr().out
    assert [entry.flag for entry in catalog().values() if f"  {entry.flag}" not in printed] == []


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["confg"]) == 2
    assert "there is no command confg" in capsys.readouterr().err
    assert cli.main([]) == 0
    assert "config" in capsys.readouterr().out


def test_importing_miles_does_not_bring_the_configuration_along() -> None:
    program = "import sys, miles; assert 'pydantic' not in sys.modules and 'miles.config' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_importing_the_configuration_stays_light() -> None:
    program = "import sys, miles.config; print(*{'torch', 'transformers', 'redis', 'grpc', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert ran.stdout.strip() == ""


def test_no_secret_is_in_the_dry_run_the_stored_job_or_a_fault() -> None:
    from miles.config.schema.faults import Fault
    from miles.launcher.dry_run import describe_run
    from miles.launcher.main import stored_settings
    from miles.launcher.run_plan import RunPlan

    given = {"redis_url": "redis://:hunter2@r:1/3", "train_env_vars": {"WANDB": "hunter2"}, "train_dtype": "float32"}
    config = JobConfig.from_flat(MINIMAL | given | {"rollout_dtype": "float32"}).resolve("cpu")
    assert "hunter2" not in describe_run(RunPlan(config))
    assert stored_settings(config)["redis_url"] == "redis://r:1/3"
    for key in ("redis_url", "train_env_vars"):
        fault = Fault(key, given[key], "it is wrong", "correct it")
        assert "hunter2" not in f"{fault} {fault.to_json()}"
        assert "it is wrong" in str(fault)

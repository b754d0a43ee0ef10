"""Checks on real broken surroundings: taken ports, small and read-only file systems, unsuitable Redis servers."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import redis
from config_cases import MINIMAL

from miles import cli
from miles.config.command.flags import CommandLine, to_command_line
from miles.doctor import folders, memory, packages, ports, proxies, redis_server
from miles.doctor.checks import Check, run_checks
from miles.doctor.finding import Finding, Status, ok
from miles.doctor.probe import torch_facts
from miles.doctor.subject import Subject
from miles.memory.amount import Part
from miles.queue.server import server_binary
from miles.rpc.exit_codes import ExitCode

ROOT = pathlib.Path(__file__).parents[3]


def subject(**settings: object) -> Subject:
    return Subject.of(CommandLine(flat={**MINIMAL, "device": "cpu", **settings}))


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 8 MiB in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,noexec", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def evicting_redis(tmp_path: pathlib.Path) -> Iterator[str]:
    """A Redis server that evicts keys, forgets everything, and has a user who may only read."""
    path = tmp_path / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--maxmemory", "100mb"]
    server = subprocess.Popen(
        [server_binary(), *options, "--maxmemory-policy", "allkeys-lru"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    client = redis.Redis(unix_socket_path=str(path))
    deadline = time.monotonic() + 60
    while not path.exists() or not _answers(client):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client.execute_command(
        "ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@read", "+@connection", "+info", "+time"
    )
    yield str(path)
    server.kill()
    server.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_a_redis_server_that_evicts_and_forgets_is_unsuitable(evicting_redis: str) -> None:
    facts = redis_server.look(subject(redis_url=f"unix://{evicting_redis}"))
    found = redis_server.judge(facts)
    assert [(finding.status, finding.change) for finding in found] == [
        (Status.FAIL, "redis-cli CONFIG SET maxmemory-policy noeviction"),
        (Status.WARN, "redis-cli CONFIG SET appendonly yes"),
    ]
    assert redis.Redis(unix_socket_path=evicting_redis).dbsize() == 0


def test_a_redis_user_without_rights_is_told_which_are_missing(evicting_redis: str) -> None:
    facts = redis_server.look(subject(redis_url=f"unix://reader:secret@{evicting_redis}"))
    assert set(facts.denied) >= {"SET", "XADD", "EVAL", "DEL"}
    assert "GET" not in facts.denied
    assert "secret" not in str(redis_server.judge(facts))
    wrong = redis_server.judge(redis_server.look(subject(redis_url=f"unix://reader:wrong@{evicting_redis}")))
    assert [finding.status for finding in wrong] == [Status.FAIL]
    assert "refuses user or password" in wrong[0].found


def test_a_redis_server_that_is_away_is_one_finding() -> None:
    (found,) = redis_server.judge(redis_server.look(subject(redis_url="unix:///nowhere/redis.sock")))
    assert found.status is Status.FAIL
    assert "does not answer" in found.found


def test_the_redis_server_of_a_run_is_found() -> None:
    (found,) = redis_server.judge(redis_server.look(Subject(None)))
    assert found.status is Status.OK
    assert "redis-server" in found.found


def test_a_taken_port_names_the_process_that_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        (found,) = ports.judge(ports.look(subject(controller_port=number)))
        assert found.status is Status.FAIL
        assert f"--controller-port {number} is taken by" in found.found
        assert f"(process {os.getpid()})" in found.found
    (found,) = ports.judge(ports.look(subject(controller_port=number)))
    assert found.status is Status.OK


def test_a_host_of_another_machine_is_no_place_to_listen() -> None:
    port = ports.try_port("--controller-port", "192.0.2.1", 7000)
    (found,) = ports.judge([port])
    assert (found.status, found.change) == (Status.FAIL, "give an address of this machine as --host")


def test_a_run_folder_in_memory_that_is_too_small_is_refused(small_disk: pathlib.Path) -> None:
    need = Part("disk", 1 << 30, "a formula")
    (found,) = folders.judge([folders.measure("--run-dir", str(small_disk / "a" / "b"), need, lasting=True)])
    assert found.status is Status.FAIL
    assert "8.0 MiB free on tmpfs; the run writes about 1.0 GiB (a formula)" in found.found
    shared = memory.look_at_shared(subject(), str(small_disk))
    assert shared.total == 8 << 20
    assert memory.judge_shared(shared)[0].status is Status.WARN
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (found,) = folders.judge([folders.measure("--run-dir", str(small_disk), lasting=True)])
    assert found.found.endswith("is mounted read-only")


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "runs").write_text("")
    (found,) = folders.judge([folders.measure("--run-dir", str(tmp_path / "runs"), lasting=True)])
    assert found.found.endswith("runs is a file")


def test_a_missing_folder_of_shared_memory_is_no_crash(tmp_path: pathlib.Path) -> None:
    assert not memory.look_at_shared(Subject(None), str(tmp_path / "none")).writable


def test_proxies_are_read_in_either_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://p:1")
    monkeypatch.setenv("no_proxy", "10.0.0.1")
    facts = proxies.look(subject(rm_type=None, reward_service=["default=10.0.0.1:9300", "b=10.0.0.2:9300"]))
    assert facts.set["https_proxy"] == "http://p:1"
    found = [finding for finding in proxies.judge(facts) if finding.status is Status.WARN]
    assert [finding.change for finding in found] == ["export no_proxy=10.0.0.1,10.0.0.2"]


def test_an_interpreter_without_sglang_is_told_from_one_that_is_none() -> None:
    engine = subject(rollout_backend="sglang", rollout_engine_python="/bin/false")
    assert packages.look(engine).engine_installed is None
    engine = subject(rollout_backend="sglang", rollout_engine_python=sys.executable)
    installed = packages.look(engine).engine_installed
    assert installed is not None
    assert installed["torch"] is not None


def test_the_pins_are_those_of_the_project() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = [f'{each} ; extra == "{name}"' for name, each_of in extras.items() for each in each_of]
    pinned = packages.pins(listed)
    assert {"torch", "transformers", "sglang", "megatron-core", "megatron-bridge"} <= set(pinned)
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: constraints.get(name, version) for name, version in pinned.items()} == pinned


def test_a_check_that_hangs_or_fails_hides_no_other() -> None:
    def hang(_: Subject) -> None:
        time.sleep(3600)

    def crash(_: Subject) -> None:
        raise OSError("the disk is gone")

    def judge(_: object) -> list[Finding]:
        return [ok("good")]

    checks = [
        Check("a", hang, judge, limit_s=0.2),
        Check("b", crash, judge),
        Check("c", lambda subject: subject.get("seed"), judge),
        Check("d", lambda _: None, judge),
    ]
    found = run_checks(subject(seed="x"), checks)
    assert [(name, finding.status.value) for name, finding in found] == [
        ("a", "fail"),
        ("b", "fail"),
        ("c", "warn"),
        ("d", "ok"),
    ]
    assert "the disk is gone" in found[1][1].found


def test_the_command_reports_without_pytorch_and_changes_nothing(files: pathlib.Path) -> None:
    before = sorted(files.rglob("*"))
    program = "import sys; sys.modules['torch'] = None; from miles.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = [*to_command_line(MINIMAL), "--device", "cpu", "--lrr", "1", "--lr", "-1"]
    said = subprocess.run(
        [sys.executable, "-c", program, "doctor", "--json", *flags],
        capture_output=True,
        text=True,
        cwd=files,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (said.returncode, said.stderr) == (ExitCode.MACHINE_UNSUITABLE, "")
    report = json.loads(said.stdout)
    mine = [finding for finding in report["findings"] if finding["check"] == "configuration"]
    assert [(finding["status"], finding["found"]) for finding in mine] == [
        ("fail", "--lrr = 1, but there is no such flag"),
        ("fail", "lr = -1, but it must be at least 0"),
    ]
    assert mine[0]["change"] == "did you mean --lr?"
    assert "PyTorch is not installed" in said.stdout
    assert sorted(files.rglob("*")) == before


@pytest.mark.slow
def test_pytorch_says_what_it_is_and_how_fast_this_processor_is() -> None:
    facts = torch_facts()
    assert facts is not None
    assert facts["version"].startswith("2.")
    assert set(facts["speed"]) == {"bfloat16_slowdown", "float16_slowdown"}


def test_help_explains_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    assert "The exit code is 0 without a fail, else 22." in capsys.readouterr().out

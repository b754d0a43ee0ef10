"""The reward service and its client as separate processes and real gRPC."""

from __future__ import annotations

import asyncio
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import grpc.aio
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from miles.config.sections.reward import RewardConfig
from miles.reward_sdk import RewardClient, ScoreOutcome
from miles.reward_sdk.servicer import SERVICE_NAME
from miles.rpc import connect
from miles.rpc.gen import reward_pb2, reward_pb2_grpc
from miles.services.rollout.groups.scoring import JobRewards
from miles.types import Sample, SampleStatus, VersionSpan
from miles.types.convert import sample_to_proto

START_DEADLINE_S = 200

USER_REWARDS = '''
import asyncio, ctypes, math, os, time
from miles.reward_sdk import Scored

def mixed(sample):
    """Does what the response says."""
    match sample.response:
        case "raise": raise ValueError("of the user's own making")
        case "nan": return math.nan
        case "inf": return math.inf
        case "text": return "1"
        case "none": return None
        case "exit": raise SystemExit(3)
        case "die": os._exit(7)
        case "crash": ctypes.string_at(0)
        case "hang":
            while True: pass
        case "sleep": time.sleep(1.5)
        case "wait":
            while not os.path.exists("go"): time.sleep(0.02)
        case "named": return {"a": 1.0, "b": 0.5}
        case "scored": return Scored(1.0, {"pid": os.getpid()})
        case "loop": return asyncio.run(asyncio.sleep(0, 1.0))
        case "print": print("noise on standard output")
    return 1.0

async def judge(sample):
    match sample.response:
        case "raise": raise ValueError("of the user's own making")
        case "forever": await asyncio.sleep(3600)
        case "hang": time.sleep(3600)
        case "cancel": raise asyncio.CancelledError
        case "slow": await asyncio.sleep(1)
    return 1.0

def ranked(samples):
    if samples[0].response == "short": return [1.0]
    return [float(rank) for rank, _ in enumerate(samples)]
'''


class Service:
    """A reward service process."""

    def __init__(self, arguments: list[str], folder: pathlib.Path) -> None:
        self.log = folder / f"reward-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stderr=log, stdout=log)
        self.address = self._wait_until_listening()

    def _wait_until_listening(self) -> str:
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            if found := re.search(r"listening on (\S+):", self.log.read_text()):
                return found[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise TimeoutError(f"waited {START_DEADLINE_S} s for the reward service to listen: {self.log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Start]:
    """Starts `python -m miles.services.reward` with more arguments, in a folder that has `user_rewards.py`."""
    (tmp_path / "user_rewards.py").write_text(USER_REWARDS)
    started: list[Service] = []

    def start(*arguments: str, listen: str = "127.0.0.1:0", script: str = "") -> Service:
        program = [script] if script else ["-m", "miles.services.reward", "--listen", listen]
        started.append(Service([*program, *arguments], tmp_path))
        return started[-1]

    yield start
    for service in started:
        service.kill()


def answer(response: str = "4", label: str | None = "4", index: int = 0, **metadata: str) -> Sample:
    return Sample(
        group_id=7,
        index=index,
        prompt="2 + 2 =",
        tokens=np.arange(5, dtype=np.int32),
        response_length=2,
        response=response,
        label=label,
        status=SampleStatus.COMPLETED,
        metadata=dict(metadata),
        rollout_routed_experts=np.zeros((4, 2, 2), np.uint8),
        weight_versions=(VersionSpan(0, 0, 2),),
    )


def answers(*responses: str) -> list[Sample]:
    return [answer(response, index=index) for index, response in enumerate(responses)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_the_built_in_rewards_score_by_name(start: Start) -> None:
    service = start("--rewards", "last_number", "exact_match", "math", "--workers", "1")
    samples = answers("2 + 2 = 4", "4", "$\\frac{8}{2}$", "5")
    async with RewardClient({"default": service.address}) as client:
        for reward, expected in [
            ("", [1.0, 1.0, 0.0, 0.0]),
            ("last_number", [1.0, 1.0, 0.0, 0.0]),
            ("exact_match", [0.0, 1.0, 0.0, 0.0]),
            ("math", [1.0, 1.0, 1.0, 0.0]),
        ]:
            outcomes = await client.score(samples, reward=reward)
            assert outcomes == [ScoreOutcome(reward=value) for value in expected]
        [unknown] = await client.score(answers("4"), reward="maths")
        assert "'maths'" in str(unknown.error)
        assert "exact_match" in str(unknown.error)


async def test_the_service_describes_itself_and_is_healthy(start: Start) -> None:
    service = start("--rewards", "exact_match", "last_number")
    async with connect(service.address) as channel:
        described = await reward_pb2_grpc.RewardServiceStub(channel).Describe(reward_pb2.DescribeRequest())
        assert list(described.rewards) == ["exact_match", "last_number"]
        assert described.default_reward == "exact_match"
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for response in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request])):
            assert SERVICE_NAME in {named.name for named in response.list_services_response.service}


@pytest.mark.parametrize(
    ("response", "told"),
    [
        ("raise", "raised ValueError: of the user's own making (.*user_rewards.py:8)"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("text", "returned '1', a str"),
        ("none", "returned None"),
        ("exit", "raised SystemExit: 3"),
        ("die", "ended with code 7"),
        ("crash", "ended with code -11"),
    ],
)
async def test_a_failing_reward_is_an_error_of_its_sample_alone(start: Start, response: str, told: str) -> None:
    service = start("--custom-rm-path", "user_rewards.mixed", "--workers", "2")
    async with RewardClient({"default": service.address}) as client:
        good, bad, last = await client.score(answers("4", response, "named"))
        assert good == ScoreOutcome(reward=1.0)
        assert last == ScoreOutcome(reward={"a": 1.0, "b": 0.5})
        assert bad.reward is None
        assert re.search(told.replace("(", r"\(").replace(")", r"\)"), str(bad.error))
        assert "'mixed'" in str(bad.error)
        assert "sample 1 of group 7" in str(bad.error)
        assert await client.score(answers("4")) == [ScoreOutcome(reward=1.0)]


async def test_a_hung_reward_is_killed_at_its_deadline_and_blocks_nobody(start: Start) -> None:
    service = start("--custom-rm-path", "user_rewards.mixed", "--workers", "1")
    async with RewardClient({"default": service.address}, timeout_s=3, retries=0) as client:
        [before] = await client.score(answers("scored"))
        [hung] = await client.score(answers("hang"))
        assert "killed" in str(hung.error)
        assert "sample 0 of group 7" in str(hung.error)
        [after] = await client.score(answers("scored"))
        assert after.metadata["pid"] != before.metadata["pid"]
        assert not psutil.pid_exists(before.metadata["pid"])


async def test_a_slow_reward_does_not_hold_up_others(start: Start, tmp_path: pathlib.Path) -> None:
    service = start("--custom-rm-path", "user_rewards.mixed", "--workers", "2")
    async with RewardClient({"default": service.address}) as client:
        await client.score(answers("4", "4"))
        slow = asyncio.create_task(client.score(answers("wait")))
        await asyncio.sleep(0.2)
        assert await client.score(answers(*["4"] * 20)) == [ScoreOutcome(reward=1.0)] * 20
        assert not slow.done()
        (tmp_path / "go").touch()
        assert await slow == [ScoreOutcome(reward=1.0)]


async def test_blocking_functions_may_run_event_loops_and_print(start: Start) -> None:
    service = start("--custom-rm-path", "user_rewards.mixed", "--workers", "1")
    async with RewardClient({"default": service.address}) as client:
        assert await client.score(answers("loop", "print")) == [ScoreOutcome(reward=1.0)] * 2


async def test_async_functions_run_concurrently_in_one_process(start: Start) -> None:
    service = start("--custom-rm-path", "user_rewards.judge", "--workers", "1")
    async with RewardClient({"default": service.address}, timeout_s=30) as client:
        assert await client.score(answers(*["slow"] * 60)) == [ScoreOutcome(reward=1.0)] * 60
        raised, cancelled, good = await client.score(answers("raise", "cancel", "4"))
        assert "ValueError" in str(raised.error)
        assert "CancelledError" in str(cancelled.error)
        assert good.reward == 1.0
    assert len(psutil.Process(service.process.pid).children()) == 1


async def test_an_async_function_past_its_deadline_is_cancelled(start: Start) -> None:
    service = start("--custom-rm-path", "user_rewards.judge", "--workers", "1")
    async with RewardClient({"default": service.address}, timeout_s=2, retries=0) as client:
        forever, good = await client.score(answers("forever", "4"))
        assert "was cancelled after" in str(forever.error)
        assert good.reward == 1.0


async def test_an_async_function_that_blocks_is_killed_and_its_neighbours_are_scored(start: Start) -> None:
    service = start("--custom-rm-path", "user_rewards.judge", "--workers", "1")
    async with connect(service.address) as channel:
        stream = reward_pb2_grpc.RewardServiceStub(channel).Score()
        for request_id, response, deadline_ms in [(1, "slow", 30_000), (2, "hang", 500), (3, "4", 30_000)]:
            samples = [sample_to_proto(answer(response))]
            await stream.write(reward_pb2.ScoreRequest(request_id=request_id, samples=samples, deadline_ms=deadline_ms))
            await asyncio.sleep(0.1)
        got = [await stream.read() for _ in range(3)]
        assert got[0].request_id == 2
        kinds = {response.request_id: response.scores[0].WhichOneof("kind") for response in got}
        assert kinds == {1: "reward", 2: "error", 3: "reward"}


async def test_answers_come_in_the_order_they_finish(start: Start, tmp_path: pathlib.Path) -> None:
    service = start("--custom-rm-path", "user_rewards.mixed", "--workers", "2")
    async with connect(service.address) as channel:
        stream = reward_pb2_grpc.RewardServiceStub(channel).Score()
        for request_id, response in [(1, "wait"), (2, "4"), (3, "4")]:
            samples = [sample_to_proto(answer(response))]
            await stream.write(reward_pb2.ScoreRequest(request_id=request_id, samples=samples))
        await stream.done_writing()
        assert [(await stream.read()).request_id for _ in range(2)] == [2, 3]
        (tmp_path / "go").touch()
        assert (await stream.read()).request_id == 1


async def test_a_malformed_sample_is_refused_and_the_stream_goes_on(start: Start) -> None:
    service = start("--rewards", "exact_match")
    async with connect(service.address) as channel:
        stream = reward_pb2_grpc.RewardServiceStub(channel).Score()
        bad = sample_to_proto(answer())
        bad.response_length = 99
        for request_id, sample in [(1, bad), (2, sample_to_proto(answer()))]:
            await stream.write(reward_pb2.ScoreRequest(request_id=request_id, samples=[sample]))
        got = {response.request_id: response.scores[0] for response in [await stream.read(), await stream.read()]}
        assert "response_length" in got[1].error
        assert got[2].reward.value == 1.0


async def test_a_group_reward_sees_the_whole_group(start: Start) -> None:
    service = start("--custom-rm-path", "user_rewards.ranked", "--group-rm")
    async with RewardClient({"default": service.address}) as client:
        outcomes = await client.score(answers("a", "b", "c"), group=True)
        assert [outcome.reward for outcome in outcomes] == [0.0, 1.0, 2.0]
        short = await client.score(answers("short", "b"), group=True)
        assert all("1 rewards for 2 samples" in str(outcome.error) for outcome in short)
        [alone] = await client.score(answers("a"))
        assert "--group-rm" in str(alone.error)


@pytest.fixture
def script(tmp_path: pathlib.Path) -> str:
    """A user's own reward service in a few lines."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from miles.reward_sdk import reward, serve\n\n"
        "@reward\ndef length(sample):\n    return len(sample.response)\n\n"
        "serve(port=0)\n"
    )
    return str(path)


async def test_a_users_own_service_is_chosen_by_name(start: Start, script: str) -> None:
    own, builtin = start(script=script), start("--rewards", "exact_match")
    async with RewardClient({"default": builtin.address, "mine": own.address}) as client:
        samples = [answer("12345", reward_service="mine"), answer("4"), answer("4", reward_service="yours")]
        mine, default, unknown = await client.score(samples)
        assert mine.reward == 5.0
        assert default.reward == 1.0
        assert "--reward-service yours=HOST:PORT" in str(unknown.error)


async def test_a_rollout_asks_each_service_for_a_reward_it_has(start: Start, script: str) -> None:
    own, builtin = start(script=script), start("--rewards", "exact_match", "last_number")
    config = RewardConfig(rm_type="last_number", reward_service=(f"mine={own.address}",))
    async with RewardClient({"default": builtin.address, "mine": own.address}) as client:
        samples = [answer("= 4", reward_service="mine"), answer("= 4"), answer("= 4", rm_type="exact_match")]
        outcomes = await JobRewards(client, config).score_each(samples)
        assert [outcome.reward for outcome in outcomes] == [3.0, 1.0, 0.0]


async def test_scoring_survives_a_kill_and_restart_of_the_service(start: Start) -> None:
    listen = f"127.0.0.1:{free_port()}"
    arguments = ("--custom-rm-path", "user_rewards.mixed", "--workers", "2")
    service = start(*arguments, listen=listen)
    async with RewardClient({"default": listen}, timeout_s=60, retries=2) as client:
        await client.score(answers("4"))
        under_way = asyncio.create_task(client.score(answers("sleep", "sleep", "4")))
        await asyncio.sleep(0.3)
        service.kill()
        while_down = asyncio.create_task(client.score(answers("named")))
        await asyncio.sleep(0.5)
        start(*arguments, listen=listen)
        assert await under_way == [ScoreOutcome(reward=1.0)] * 3
        assert await while_down == [ScoreOutcome(reward={"a": 1.0, "b": 0.5})]


async def test_a_service_that_is_not_there_is_an_error_after_the_retries() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with RewardClient({"default": address}, timeout_s=0.3, retries=1) as client:
        [outcome] = await client.score(answers("4"))
        assert f"'default' at {address} did not score within 2 attempts of up to 0.3 s" in str(outcome.error)


async def test_a_server_without_the_reward_service_is_an_error_after_the_retries() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with RewardClient({"default": f"127.0.0.1:{port}"}, timeout_s=5, retries=1) as client:
        [outcome] = await client.score(answers("4"))
        assert "UNIMPLEMENTED" in str(outcome.error)
    await server.stop(None)


async def test_workers_end_with_the_service_even_when_it_is_killed_and_they_hang(start: Start) -> None:
    service = start("--custom-rm-path", "user_rewards.mixed", "--workers", "1")
    async with RewardClient({"default": service.address}, timeout_s=60, retries=0) as client:
        hanging = asyncio.create_task(client.score(answers("hang")))
        await asyncio.sleep(0.5)
        workers = psutil.Process(service.process.pid).children()
        assert len(workers) == 1
        service.kill()
        gone, alive = psutil.wait_procs(workers, timeout=120)
        assert (len(gone), alive) == (1, [])
        [outcome] = await hanging
        assert "UNAVAILABLE" in str(outcome.error)


def test_a_custom_function_that_cannot_be_imported_ends_the_start_with_bad_config(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "miles.services.reward", "--custom-rm-path", "no_such_module.mine"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=START_DEADLINE_S)
    assert ended.returncode == 2
    assert "no_such_module" in ended.stderr


def test_sigterm_ends_the_service_in_order(start: Start) -> None:
    service = start("--rewards", "exact_match")
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=START_DEADLINE_S) == 0

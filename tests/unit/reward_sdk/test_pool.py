"""Which worker process a call gets, and when processes start. The processes are real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import AsyncIterator

import pytest

from miles.reward_sdk.functions import RewardLoadError, Source
from miles.reward_sdk.pool import StillRunning, WorkerPool
from miles.reward_sdk.scorer import Scorer
from miles.reward_sdk.worker_process import WorkerDied, WorkerProcess
from miles.rpc.gen import reward_pb2, sample_pb2
from miles.types import Sample
from miles.types.convert import sample_to_proto

DEADLINE_S = 60.0
REWARDS = """
import os, pathlib, time
from miles.reward_sdk import Scored

folder = pathlib.Path(__file__).parent
if (folder / "refuses").exists():
    raise RuntimeError("no room for the model")
if (folder / "loads slowly").exists():
    (folder / "loading").touch()
    time.sleep(3600)

def mixed(sample):
    if sample.response in ("die", "hang"):
        with (folder / f"{sample.response}-calls").open("a") as calls:
            calls.write("x")
    match sample.response:
        case "die": os._exit(7)
        case "hang": time.sleep(3600)
        case "fork and hang":
            if not os.fork(): os.setsid()
            (folder / f"forked-{os.getpid()}").touch()
            time.sleep(3600)
        case "wait":
            (folder / f"runs-{os.getpid()}").touch()
            while not (folder / "go").exists(): time.sleep(0.005)
    return Scored(1.0, {"pid": os.getpid()})
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with the rewards, which worker processes find, and with the files that they wait for."""
    (tmp_path / "pool_rewards.py").write_text(REWARDS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


SOURCES = [Source("pool_rewards.mixed")]


@contextlib.asynccontextmanager
async def pool_of(size: int) -> AsyncIterator[WorkerPool]:
    """A pool that has its first worker."""
    pool = WorkerPool(SOURCES, size=size, capacity=1)
    pool.adopt(await WorkerProcess.start(SOURCES))
    try:
        yield pool
    finally:
        await pool.close()


def sample(response: str, index: int = 0) -> sample_pb2.Sample:
    return sample_to_proto(Sample(group_id=7, index=index, prompt="p", response=response))


def call(pool: WorkerPool, response: str, deadline_s: float = DEADLINE_S) -> asyncio.Task[list[reward_pb2.Score]]:
    request = reward_pb2.ScoreRequest(reward="mixed", samples=[sample(response)])
    return asyncio.create_task(pool.score(request, time.monotonic() + deadline_s))


async def until(path: pathlib.Path, pattern: str, count: int = 1) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while len(list(path.glob(pattern))) < count:  # noqa: ASYNC110 (another process creates them)
            await asyncio.sleep(0.01)


async def test_a_call_takes_a_worker_that_becomes_free_while_another_one_still_loads(folder: pathlib.Path) -> None:
    async with pool_of(2) as pool:
        (folder / "loads slowly").touch()
        first, second = call(pool, "wait"), call(pool, "4")
        await until(folder, "loading")
        (folder / "go").touch()
        [[one], [two]] = await asyncio.gather(first, second)
        assert one.metadata_json == two.metadata_json


async def test_slow_calls_get_as_many_workers_as_the_pool_may_have(folder: pathlib.Path) -> None:
    async with pool_of(3) as pool:
        calls = [call(pool, "wait") for _ in range(5)]
        await until(folder, "runs-*", 3)
        (folder / "go").touch()
        scores = [score for scores in await asyncio.gather(*calls) for score in scores]
        assert len({score.metadata_json for score in scores}) == 3


async def test_a_failed_start_is_no_error_of_calls_that_another_worker_scores(
    folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with pool_of(2) as pool:
        (folder / "refuses").touch()
        calls = [call(pool, "wait") for _ in range(2)]
        async with asyncio.timeout(DEADLINE_S):
            while "no further worker process could be started, 1 go on" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        (folder / "go").touch()
        assert all(score.HasField("reward") for [score] in await asyncio.gather(*calls))
    assert "no room for the model" in caplog.text


async def test_a_failed_start_is_an_error_of_the_calls_when_there_is_no_worker(folder: pathlib.Path) -> None:
    async with pool_of(2) as pool:
        with pytest.raises(WorkerDied, match="code 7"):
            await call(pool, "die")
        (folder / "refuses").touch()
        with pytest.raises(RewardLoadError, match="no room for the model"):
            await call(pool, "4")
        (folder / "refuses").unlink()
        [score] = await call(pool, "4")
        assert score.HasField("reward")


async def test_a_call_that_stops_waiting_leaves_the_worker_to_the_next(folder: pathlib.Path) -> None:
    async with pool_of(1) as pool:
        running, cancelled, late, last = call(pool, "wait"), call(pool, "4"), call(pool, "4"), call(pool, "4")
        await until(folder, "runs-*")
        cancelled.cancel()
        (folder / "go").touch()
        await running
        late.cancel()  # it may have the worker by now
        [score] = await last
        assert score.HasField("reward")
        [score] = await call(pool, "4")
        assert score.HasField("reward")


async def test_a_caller_may_stop_waiting_for_a_call_that_runs_on(folder: pathlib.Path) -> None:
    async with pool_of(1) as pool:
        request = reward_pb2.ScoreRequest(reward="mixed", samples=[sample("wait")])
        with pytest.raises(StillRunning):
            await pool.score(request, time.monotonic() + DEADLINE_S, patience_s=0.01)
        behind = call(pool, "4")
        await until(folder, "runs-*")
        assert not behind.done()
        (folder / "go").touch()
        assert (await behind)[0].HasField("reward")


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_the_successor_of_a_killed_worker_starts_when_the_process_is_gone(folder: pathlib.Path) -> None:
    async with pool_of(1) as pool:
        [score] = await call(pool, "4")
        killed: int = json.loads(score.metadata_json)["pid"]
        starts: list[bool] = []
        watching = True

        def on_event(event: str, _: tuple[object, ...]) -> None:
            if watching and event == "subprocess.Popen":
                starts.append(exists(killed))

        sys.addaudithook(on_event)
        hung, behind = call(pool, "hang", 0.5), call(pool, "4")
        with pytest.raises(TimeoutError, match="killed"):
            await hung
        [score] = await behind
        watching = False
        assert score.HasField("reward")
        assert starts == [False]


async def test_a_killed_worker_is_gone_though_a_process_that_it_forked_is_not(folder: pathlib.Path) -> None:
    async with pool_of(1) as pool:
        [score] = await call(pool, "4")
        killed: int = json.loads(score.metadata_json)["pid"]
        hung = call(pool, "fork and hang", 2.0)
        behind = call(pool, "4")
        try:
            with pytest.raises(TimeoutError, match="killed"):
                await hung
            assert (await behind)[0].HasField("reward")
        finally:
            for path in folder.glob("forked-*"):
                if (pid := int(path.name.removeprefix("forked-"))) != killed:
                    os.kill(pid, signal.SIGKILL)


async def test_the_time_that_a_call_may_run_begins_when_it_has_a_worker(folder: pathlib.Path) -> None:
    async with pool_of(1) as pool:
        running = call(pool, "wait")
        await until(folder, "runs-*")
        request = reward_pb2.ScoreRequest(reward="mixed", samples=[sample("4")])
        behind = asyncio.create_task(pool.score(request, time.monotonic() + DEADLINE_S, run_s=10))
        hung = reward_pb2.ScoreRequest(reward="mixed", samples=[sample("hang")])
        last = asyncio.create_task(pool.score(hung, time.monotonic() + DEADLINE_S, run_s=0.01))
        await asyncio.sleep(0.1)  # longer than the last one may run
        assert not last.done()
        (folder / "go").touch()
        [[one], [two]] = await asyncio.gather(running, behind)
        assert one.metadata_json == two.metadata_json  # neither was killed
        with pytest.raises(TimeoutError, match=r"did not end in 0.01 s; its process was killed"):
            await last


async def test_malformed_samples_do_not_make_a_function_look_fast(folder: pathlib.Path) -> None:
    async with pool_of(1) as pool:
        malformed = sample("4")
        malformed.response_length = 99
        request = reward_pb2.ScoreRequest(reward="mixed", samples=[malformed] * 1000)
        before = pool.paces["mixed"].mean_s
        scores = await pool.score(request, time.monotonic() + DEADLINE_S)
        assert all("malformed" in score.error for score in scores)
        assert pool.paces["mixed"].mean_s == before


async def test_a_call_whose_caller_stopped_waiting_enters_the_pace_once(folder: pathlib.Path) -> None:
    async with pool_of(1) as pool:
        request = reward_pb2.ScoreRequest(reward="mixed", samples=[sample("wait")])
        with pytest.raises(StillRunning):
            await pool.score(request, time.monotonic() + DEADLINE_S, patience_s=0.01)
        noted = pool.paces["mixed"].mean_s
        (folder / "go").touch()
        behind = reward_pb2.ScoreRequest(reward="mixed", samples=[sample("die")])
        with pytest.raises(WorkerDied):  # gets the worker after the first call has ended, and has no time to note
            await pool.score(behind, time.monotonic() + DEADLINE_S)
        assert pool.paces["mixed"].mean_s == noted


async def test_a_call_that_was_killed_enters_the_pace(folder: pathlib.Path) -> None:
    async with pool_of(1) as pool:
        before = pool.paces["mixed"].mean_s
        with pytest.raises(TimeoutError, match="killed"):
            await call(pool, "hang", 1.0)
        assert pool.paces["mixed"].mean_s > before


async def test_calls_that_wait_end_with_the_pool(folder: pathlib.Path) -> None:
    async with pool_of(1) as pool:
        calls = [call(pool, "wait"), call(pool, "4")]
        await until(folder, "runs-*")
    for each in calls:
        with pytest.raises(WorkerDied):
            await each


@pytest.mark.parametrize(("bad", "told", "deadline_s"), [("die", "code 7", DEADLINE_S), ("hang", "killed", 12.0)])
async def test_a_sample_that_shares_a_call_harms_no_other(
    folder: pathlib.Path, bad: str, told: str, deadline_s: float
) -> None:
    scorer = await Scorer.start(SOURCES, workers=3)
    try:
        slow = asyncio.create_task(scorer.score(reward_pb2.ScoreRequest(samples=[sample("wait")] * 3)))
        await until(folder, "runs-*", 3)  # workers enough for a hung call and its neighbours
        (folder / "go").touch()
        await slow
        async with asyncio.timeout(DEADLINE_S):
            while len(scorer.shares("mixed", 8)) > 1:  # until the function is known to be fast
                await scorer.score(reward_pb2.ScoreRequest(samples=[sample("4", i) for i in range(8)]))
        request = reward_pb2.ScoreRequest(samples=[sample(bad if i == 3 else "4", i) for i in range(8)])
        request.deadline_ms = int(deadline_s * 1000)
        scores = await scorer.score(request)
        assert [score.HasField("reward") for score in scores] == [i != 3 for i in range(8)]
        assert told in scores[3].error
        assert "sample 3 of group 7" in scores[3].error
        assert len((folder / f"{bad}-calls").read_text()) == 2  # with the others, then alone
    finally:
        await scorer.close()


async def test_a_group_without_samples_has_no_scores(folder: pathlib.Path) -> None:
    scorer = await Scorer.start([Source("pool_rewards.mixed", group=True)])
    try:
        assert await scorer.score(reward_pb2.ScoreRequest(group=True)) == []
    finally:
        await scorer.close()

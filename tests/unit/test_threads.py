"""Nothing that is raised in a thread or task ends it unseen."""

from __future__ import annotations

import asyncio
import pathlib
import re
import sys

import pytest

from miles.tasks import cancel, until_end
from miles.threads import EscapedError, Threads, guard_threads, only_exceptions

ROOT = pathlib.Path(__file__).parents[2]


class Panic(BaseException):
    """As extensions and PyTorch's checkpoint reader raise."""


def fail(error: BaseException) -> None:
    raise error


ESCAPING = [Panic("lost"), SystemExit(3), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ESCAPING, ids=lambda error: type(error).__name__)
def test_a_call_in_a_pool_ends_with_an_exception_that_names_what_was_raised(error: BaseException) -> None:
    with Threads(1) as threads:
        with pytest.raises(EscapedError, match=type(error).__name__) as caught:
            threads.submit(fail, error).result(60)
        assert caught.value.__cause__ is error
        assert threads.submit(int, "7").result(60) == 7, "the thread lives"
        with pytest.raises(ValueError, match="invalid literal"):
            threads.submit(int, "x").result(60)


async def test_to_thread_of_a_service_never_ends_its_event_loop() -> None:
    guard_threads(asyncio.get_running_loop())
    for error in ESCAPING:
        with pytest.raises(EscapedError):
            await asyncio.to_thread(fail, error)
    with pytest.raises(EscapedError, match="SystemExit: 4"):
        await asyncio.to_thread(sys.exit, 4)


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), ValueError("x")])
def test_a_cancellation_a_users_interrupt_and_an_exception_stay_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, only_exceptions():
        raise error
    assert caught.value is error


async def test_a_service_ends_with_the_error_of_a_task_that_it_cannot_do_without() -> None:
    async def broken() -> None:
        raise RuntimeError("no heartbeat")

    async def nothing() -> None:
        return

    end = asyncio.get_running_loop().create_future()
    idle = asyncio.create_task(asyncio.Event().wait())
    with pytest.raises(RuntimeError, match="no heartbeat"):
        await until_end(end, idle, asyncio.create_task(nothing()), asyncio.create_task(broken()))
    end.set_result(None)
    await until_end(end, idle)
    await cancel(idle)


def test_services_make_pools_of_such_threads_only() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "services").rglob("*.py"))
        if re.search(r"\bThreadPoolExecutor\(", path.read_text(encoding="utf-8"))
    ]
    assert not wrong, f"use miles.threads.Threads in {', '.join(wrong)}"

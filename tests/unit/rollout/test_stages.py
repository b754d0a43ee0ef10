from __future__ import annotations

import asyncio

import pytest

from miles.services.rollout.stages import report_stage


async def test_slow_work_is_reported_until_it_is_done() -> None:
    done = asyncio.Event()
    reports = report_stage("building", _wait(done), every_s=0.01)
    assert await anext(reports) == "building"
    assert (await anext(reports)).startswith("building, for ")
    done.set()
    assert [report async for report in reports if not report.startswith("building, for ")] == []


async def test_an_error_of_the_work_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        _ = [report async for report in report_stage("building", _fail())]


@pytest.mark.parametrize("reports_read", [1, 2])
async def test_work_is_cancelled_when_nobody_reads_the_reports(reports_read: int) -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    reports = report_stage("building", work(), every_s=0.01)
    for _ in range(reports_read):
        await anext(reports)
        await asyncio.sleep(0)
    await reports.aclose()
    assert ended.is_set()


async def _wait(done: asyncio.Event) -> None:
    await done.wait()


async def _fail() -> None:
    raise ZeroDivisionError

from __future__ import annotations

import asyncio

import pytest

from miles.reward_sdk.answers import Answers


async def test_answers_reach_their_callers_in_any_order() -> None:
    answers: Answers[str] = Answers()
    sent: list[int] = []
    calls = [asyncio.create_task(answers.ask(i, lambda i=i: sent.append(i))) for i in (1, 2)]  # type: ignore[misc]
    await asyncio.sleep(0)
    assert sent == [1, 2]
    answers.put(2, "two")
    answers.put(3, "nobody's")
    answers.put(1, "one")
    answers.put(1, "again")
    assert await asyncio.gather(*calls) == ["one", "two"]
    assert 1 not in answers


async def test_a_caller_that_stops_waiting_is_forgotten() -> None:
    answers: Answers[str] = Answers()
    call = asyncio.create_task(answers.ask(1, lambda: None))
    await asyncio.sleep(0)
    assert 1 in answers
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert 1 not in answers


async def test_a_failure_is_raised_in_every_caller_that_waits() -> None:
    answers: Answers[str] = Answers()
    calls = [asyncio.create_task(answers.ask(i, lambda: None)) for i in (1, 2, 3)]
    await asyncio.sleep(0)
    answers.put(2, "two")
    answers.fail(lambda: ConnectionError("the process ended"))
    for call in (calls[0], calls[2]):
        with pytest.raises(ConnectionError, match="the process ended"):
            await call
    assert await calls[1] == "two"

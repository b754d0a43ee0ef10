from __future__ import annotations

import asyncio

import pytest

from miles.services.rollout.serving.version_gate import VersionGate, VersionPassed


async def test_it_opens_for_the_version_asked_for() -> None:
    gate = VersionGate()
    any_version = asyncio.ensure_future(gate.wait(None, None, 5))
    at_least = asyncio.ensure_future(gate.wait(3, None, 5))
    exactly = asyncio.ensure_future(gate.wait(None, 4, 5))
    await asyncio.sleep(0)
    gate.open(0)
    assert await any_version == 0
    gate.open(3)
    assert await at_least == 3
    assert not exactly.done()
    gate.open(4)
    assert await exactly == 4
    assert await gate.wait(2, 4, 5) == 4


async def test_a_version_that_will_not_come_back_is_refused_at_once() -> None:
    gate = VersionGate()
    gate.open(5)
    with pytest.raises(VersionPassed, match="version 5 already, not 4"):
        await gate.wait(None, 4, 60)


async def test_the_deadline_says_what_was_waited_for() -> None:
    gate = VersionGate()
    with pytest.raises(TimeoutError, match="at least 2; it serves none"):
        await gate.wait(2, None, 0.01)
    gate.open(1)
    gate.close()
    with pytest.raises(TimeoutError, match="version 2; it serves none"):
        await gate.wait(None, 2, 0.01)
    gate.open(1)
    with pytest.raises(TimeoutError, match="it serves version 1"):
        await gate.wait(None, 2, 0.01)

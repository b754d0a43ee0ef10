"""Engines that turn drafts off and on."""

from __future__ import annotations

import itertools

from miles.rpc.gen.rollout_pb2 import SpeculationProgress
from miles.services.controller.speculation.switches import DraftSwitches

ON = SpeculationProgress(num_steps=3)
OFF = SpeculationProgress(reason="0.81 times as fast with drafts at batch size 64")


def test_a_switch_is_told_with_its_reason_and_what_stays_as_it_is_is_not() -> None:
    switches = DraftSwitches()
    assert switches.note(0, [("rollout-0", ON)]) == []
    (off,) = switches.note(1, [("rollout-0", OFF)])
    assert "step 1" in off
    assert "draft no more" in off
    assert "rollout-0: 0.81 times as fast" in off
    assert switches.note(2, [("rollout-0", OFF)]) == []
    (on,) = switches.note(3, [("rollout-0", ON)])
    assert "draft again" in on
    assert "rollout-0 (up to 3)" in on


def test_an_engine_that_has_not_begun_is_not_off_and_one_that_begins_off_is_told() -> None:
    assert DraftSwitches().note(0, [("rollout-0", SpeculationProgress())]) == []
    assert len(DraftSwitches().note(0, [("rollout-0", OFF)])) == 1


def test_engines_that_switch_for_one_reason_share_a_line() -> None:
    (line,) = DraftSwitches().note(0, [(f"rollout-{i}", OFF) for i in range(9)])
    assert "rollout-3 and 5 engines more" in line


def test_an_engine_that_goes_back_and_forth_is_told_ever_more_rarely_and_told_as_it_is() -> None:
    switches = DraftSwitches()
    told = [step for step in range(1000) if switches.note(step, [("rollout-0", OFF if step % 2 else ON)])]
    assert 10 < len(told) < 40
    assert max(later - earlier for earlier, later in itertools.pairwise(told)) < 70
    last = "draft again" if told[-1] % 2 == 0 else "draft no more"
    state = ON if last == "draft no more" else OFF
    assert [step for step in range(1000, 1100) if switches.note(step, [("rollout-0", state)])] != []

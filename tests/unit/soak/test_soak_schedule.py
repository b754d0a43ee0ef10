"""The schedule of a soak: seeded, within the limits of the launcher, and only what is possible."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import pytest
from soak.schedule import (
    KILLS,
    OPEN_JOBS,
    WINDOW_S,
    Act,
    Action,
    Freeze,
    JobView,
    Kill,
    Look,
    Nothing,
    Restart,
    ShareFolder,
    SoakSchedule,
    Submit,
    View,
)

SERVICES = ("controller", "gateway", "rollout-0", "trainer-0")
GOOD, BAD = ("sync", "stale", "lora"), ("missing-file", "broken-model")


def schedule(seed: int) -> SoakSchedule:
    return SoakSchedule(seed, SERVICES, GOOD, BAD)


def chosen(seed: int, views: Sequence[View]) -> list[Action]:
    made = schedule(seed)
    return [made.choose(view) for view in views]


def views(count: int, *jobs: JobView, calm: bool = True, every_s: float = 5.0) -> list[View]:
    return [View(every_s * i, jobs, calm) for i in range(count)]


RUNNING, QUEUED = JobView(1, True, "running"), JobView(2, True, "queued")
PAUSED, STOPPED = JobView(3, True, "paused"), JobView(4, True, "stopped")


def test_a_seed_gives_the_same_actions_and_another_gives_others() -> None:
    asked = views(200, RUNNING, QUEUED)
    assert chosen(3, asked) == chosen(3, asked)
    assert chosen(3, asked) != chosen(4, asked)
    first, second = schedule(5), schedule(5)
    assert [first.pause_s() for _ in range(20)] == [second.pause_s() for _ in range(20)]


def test_everything_happens_in_the_end() -> None:
    actions = chosen(1, views(3000, RUNNING, PAUSED))
    assert {type(action) for action in actions} == {Submit, Act, Look, ShareFolder, Kill, Freeze, Restart}
    killed = {name for action in actions if isinstance(action, Kill) for name in action.services}
    assert killed == set(SERVICES)
    lengths = [action.seconds for action in actions if isinstance(action, Freeze)]
    assert min(lengths) < 12 < 20 < max(lengths)
    assert {action.kill for action in actions if isinstance(action, Restart)} == {True, False}


def test_a_service_is_never_killed_so_often_that_the_launcher_would_give_up() -> None:
    asked = views(4000, RUNNING, every_s=2.0)
    recent: dict[str, deque[float]] = {name: deque() for name in SERVICES}
    for view, action in zip(asked, chosen(7, asked), strict=True):
        if isinstance(action, Restart):
            recent = {name: deque() for name in SERVICES}
        for name in action.services if isinstance(action, Kill) else ():
            recent[name].append(view.now_s)
            while recent[name][0] < view.now_s - WINDOW_S:
                recent[name].popleft()
            assert len(recent[name]) <= KILLS


def test_nothing_is_struck_while_services_are_away_or_before_a_job_has_moved() -> None:
    for view in (View(0, (RUNNING,), calm=False), View(0, (RUNNING,), moved=False)):
        actions = chosen(2, [view] * 500)
        assert not [action for action in actions if isinstance(action, Kill | Freeze | Restart)]


def test_no_more_jobs_are_submitted_than_may_be_open() -> None:
    many = [JobView(i, True, "queued") for i in range(OPEN_JOBS)]
    assert not [action for action in chosen(2, views(500, *many)) if isinstance(action, Submit)]
    assert isinstance(schedule(2).choose(View(0, calm=False)), Submit)


def test_every_recipe_is_tried_before_any_comes_a_second_time_too_often() -> None:
    recipes = Counter(action.recipe for action in chosen(9, views(1000)) if isinstance(action, Submit))
    assert recipes.keys() == {*GOOD, *BAD}
    good = sum(recipes[name] for name in GOOD)
    assert good > sum(recipes[name] for name in BAD)
    assert max(recipes[name] for name in BAD) - min(recipes[name] for name in BAD) <= 1


@pytest.mark.parametrize("state", ["queued", "starting", "running", "paused", "stopped", "succeeded"])
def test_jobs_get_actions_of_their_state(state: str) -> None:
    actions = {action.action for action in chosen(1, views(3000, JobView(1, True, state))) if isinstance(action, Act)}
    assert ("resume" in actions) == (state in ("paused", "stopped"))
    assert ("pause" in actions) == (state in ("starting", "running"))


def test_winding_down_resumes_or_cancels_paused_jobs_and_does_nothing_else() -> None:
    made = schedule(1)
    actions = [made.wind_down(View(0, (RUNNING, PAUSED, STOPPED))) for _ in range(50)]
    assert {action.action for action in actions if isinstance(action, Act)} == {"resume", "cancel"}
    assert {action.number for action in actions if isinstance(action, Act)} == {PAUSED.number}
    assert made.wind_down(View(0, (RUNNING, STOPPED))) == Nothing()
    assert made.wind_down(View(0, (PAUSED,), calm=False)) == Nothing()

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from miles.services.trainer.drafts.control import Control, StoppedError

DEADLINE_S = 60.0


class Trained:
    """A thread that takes steps under a control, and holds memory."""

    def __init__(self) -> None:
        self.steps = 0
        self.holds_memory = True
        self.moves: list[str] = []
        self.stepped = threading.Event()
        self.control = Control(self._release, self._restore)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _release(self) -> int:
        self.moves.append("release")
        self.holds_memory = False
        return 7

    def _restore(self) -> None:
        self.moves.append("restore")
        self.holds_memory = True

    def _run(self) -> None:
        try:
            while True:
                self.control.between_steps()
                assert self.holds_memory
                self.steps += 1
                self.stepped.set()
                self.control.sleep(0.001)
        except StoppedError:
            pass
        finally:
            self.control.end()

    def takes_a_step(self) -> bool:
        self.stepped.clear()
        return self.stepped.wait(DEADLINE_S)


@pytest.fixture
def trained() -> Iterator[Trained]:
    trained = Trained()
    yield trained
    trained.control.stop()
    trained.thread.join(DEADLINE_S)
    assert not trained.thread.is_alive()


def test_nothing_is_computed_from_when_a_hold_returns_until_it_ends(trained: Trained) -> None:
    assert trained.takes_a_step()
    assert trained.control.hold(release_memory=False) == 0
    taken = trained.steps
    assert trained.holds_memory
    assert trained.control.hold(release_memory=False) == 0, "again: nothing changes"
    assert trained.steps == taken
    assert trained.control.is_asked_to_hold
    trained.control.go_on()
    assert trained.takes_a_step()
    assert trained.moves == []


def test_a_hold_frees_memory_once_and_gives_it_back(trained: Trained) -> None:
    trained.control.hold(release_memory=False)
    assert trained.control.hold(release_memory=True) == 7, "a hold may ask for more"
    assert trained.control.hold(release_memory=True) == 7
    assert not trained.holds_memory
    trained.control.go_on()
    assert trained.takes_a_step()
    assert trained.moves == ["release", "restore"]


def test_nobody_waits_while_memory_is_moved() -> None:
    moving, may_end, restored = threading.Event(), threading.Event(), threading.Event()

    def release() -> int:
        moving.set()
        assert may_end.wait(DEADLINE_S)
        return 7

    control = Control(release, restored.set)

    def train() -> None:
        with contextlib.suppress(StoppedError):
            while True:
                control.between_steps()
                control.sleep(0.001)

    def ask() -> None:
        control.wake()
        control.go_on()

    thread = threading.Thread(target=train, daemon=True)
    holder = threading.Thread(target=control.hold, kwargs={"release_memory": True}, daemon=True)
    asker = threading.Thread(target=ask, daemon=True)
    thread.start()
    holder.start()
    try:
        assert moving.wait(DEADLINE_S)
        asker.start()
        asker.join(DEADLINE_S / 4)
        assert not asker.is_alive(), "whoever asks would wait until all is moved"
    finally:
        may_end.set()
    assert restored.wait(DEADLINE_S), "the hold has ended meanwhile"
    control.stop()
    for each in (thread, holder):
        each.join(DEADLINE_S)
        assert not each.is_alive()


def test_a_held_thread_can_be_stopped(trained: Trained) -> None:
    trained.control.hold(release_memory=True)
    trained.control.stop()
    trained.thread.join(DEADLINE_S)
    assert not trained.thread.is_alive()
    assert not trained.holds_memory, "nothing is moved back for a thread that ends"


def test_nobody_waits_for_a_thread_that_has_ended(trained: Trained) -> None:
    trained.control.stop()
    trained.thread.join(DEADLINE_S)
    assert trained.control.hold(release_memory=True) == 0

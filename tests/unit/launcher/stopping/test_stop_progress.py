"""What a person reads while a run is stopped, and when the run is given up."""

from __future__ import annotations

import dataclasses

import pytest

from miles.launcher.stopping.stop_progress import REPEAT_S, RunSnapshot, StopProgress

TRAINING = RunSnapshot("training", "", 9.0, step=12, saved_step=8, save_limit_s=1800)
SAVING = dataclasses.replace(TRAINING, phase="saving", waiting_for="the checkpoint to be written", for_s=2.0)
FIRST_WORDS = [
    (
        TRAINING,
        "stopping: waiting for training step 13, which began 9 s ago (the trainer to leave the step between two "
        "micro-batches), at most 60 s (its samples stay in the queue); then the checkpoint of step 12 is written, at "
        "most 1800 s. Ctrl-C again stops at once without saving: steps after 8 are lost",
    ),
    (
        dataclasses.replace(TRAINING, saved_step=12, waiting_for="the end of the step"),
        "stopping: waiting for training step 13, which began 9 s ago (the end of the step), at most 60 s (its samples "
        "stay in the queue); step 12 is saved. Ctrl-C again stops at once: no finished step is lost",
    ),
    (
        dataclasses.replace(TRAINING, phase="collecting", saved_step=None),
        "stopping: waiting for the run to stop collecting samples for step 13, at most 60 s; then the checkpoint of "
        "step 12 is written, at most 1800 s. Ctrl-C again stops at once without saving: all 12 steps are lost",
    ),
    (
        dataclasses.replace(TRAINING, phase="publishing", waiting_for="engines to load version 12"),
        "stopping: waiting for engines to load version 12 (publishing for 9 s), at most 60 s; then the checkpoint of "
        "step 12 is written, at most 1800 s. Ctrl-C again stops at once without saving: steps after 8 are lost",
    ),
    (
        SAVING,
        "stopping: waiting for the checkpoint of step 12, whose writing began 2 s ago, at most 1800 s. Ctrl-C "
        "again stops at once without saving: steps after 8 are lost",
    ),
    (
        RunSnapshot("loading", "the trainer to load the model", 30.0, step=0, saved_step=None, save_limit_s=1800),
        "stopping: waiting for the trainer to load the model (loading for 30 s), at most 60 s. Ctrl-C again stops at "
        "once: no finished step is lost",
    ),
    (
        None,
        "stopping: waiting for the controller, which does not answer, at most 60 s. Ctrl-C again stops at once without "
        "saving",
    ),
]


@pytest.mark.parametrize(("moment", "text"), FIRST_WORDS, ids=[m.phase if m else "silence" for m, _ in FIRST_WORDS])
def test_the_first_words_say_what_is_waited_for_and_what_a_second_ctrl_c_costs(
    moment: RunSnapshot | None, text: str
) -> None:
    stopping = StopProgress(60.0, now_s=100.0)
    assert stopping.update(100.0, moment) == text
    assert not stopping.timed_out


def test_what_is_waited_for_is_said_again_now_and_then_and_when_it_changes() -> None:
    stopping = StopProgress(60.0, now_s=0.0)
    assert stopping.update(0.0, TRAINING)
    assert stopping.update(5.0, dataclasses.replace(TRAINING, for_s=14.0)) == ""
    again = stopping.update(REPEAT_S, dataclasses.replace(TRAINING, for_s=19.0))
    assert again == (
        "still stopping: waiting for training step 13, which began 19 s ago (the trainer to leave the step between two "
        "micro-batches), at most 50 s"
    )
    assert stopping.update(11.0, dataclasses.replace(TRAINING, for_s=20.0)) == ""
    saving = "still stopping: waiting for the checkpoint of step 12, whose writing began 2 s ago, at most 1800 s"
    assert stopping.update(12.0, SAVING) == saving
    assert stopping.update(13.0, None) == (
        "still stopping: waiting for the controller, which does not answer; it was saving, at most 48 s"
    )


def test_the_limit_ends_the_wait() -> None:
    stopping = StopProgress(60.0, now_s=0.0)
    stopping.update(0.0, TRAINING)
    stopping.update(59.0, TRAINING)
    assert not stopping.timed_out
    stopping.update(60.0, dataclasses.replace(TRAINING, for_s=69.0))
    assert stopping.timed_out
    assert stopping.loses_steps
    assert stopping.timeout_message() == (
        "gave up after 60 s of waiting for training step 13, which began 69 s ago (the trainer to leave the step "
        "between two micro-batches): the run ends without saving. The same command goes on from step 8; steps after 8 "
        "are lost"
    )


def test_a_checkpoint_has_a_limit_of_its_own() -> None:
    stopping = StopProgress(60.0, now_s=0.0)
    stopping.update(0.0, TRAINING)
    stopping.update(50.0, SAVING)
    stopping.update(1800.0, SAVING)
    assert not stopping.timed_out
    ending = dataclasses.replace(SAVING, phase="ending", waiting_for="every worker to drop the job", saved_step=12)
    stopping.update(1849.0, ending)
    assert not stopping.timed_out  # 50 s before the checkpoint and none after it so far
    stopping.update(1859.0, ending)
    assert stopping.timed_out
    assert not stopping.loses_steps
    assert stopping.timeout_message() == (
        "gave up after 60 s of waiting for every worker to drop the job (ending for 2 s): the run ends. The same "
        "command goes on from step 12"
    )


def test_a_checkpoint_that_hangs_is_given_up() -> None:
    stopping = StopProgress(60.0, now_s=0.0)
    stopping.update(0.0, SAVING)
    stopping.update(1800.0, SAVING)
    assert stopping.timed_out
    assert stopping.loses_steps


def test_a_long_limit_holds_for_the_checkpoint_too() -> None:
    stopping = StopProgress(3600.0, now_s=0.0)
    stopping.update(0.0, SAVING)
    stopping.update(1900.0, SAVING)
    assert not stopping.timed_out


def test_a_controller_that_never_answers_is_given_up() -> None:
    stopping = StopProgress(60.0, now_s=0.0)
    stopping.update(0.0, None)
    stopping.update(60.0, None)
    assert stopping.timed_out
    assert stopping.loses_steps
    assert "goes on from the newest checkpoint" in stopping.timeout_message()

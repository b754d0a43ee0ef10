"""Loads a run where the trainer's newest checkpoint left it; a new run is loaded by the same code.

The trainer reports how many steps it has taken and which groups it was trained on. Admission is rebuilt from that, from
the queue, and from the groups that live workers still generate.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable

from miles.checkpoint_folder import same_folder
from miles.rpc.gen import trainer_pb2
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WorkerFailedError
from miles.services.controller.clients.protocols import Trainer
from miles.services.controller.run.admission import Admission
from miles.services.controller.run.set_fences import fence_earlier_controllers
from miles.services.controller.run.state import LOADING, PREEMPTED, RunState
from miles.services.controller.status.step_metrics import RESPONSE_TOKENS


class NothingLeftError(WorkerFailedError):
    """The checkpoint that a run goes on from has as many steps as the run, or more."""

    def __init__(self, checkpoint: str, step: int, last: int) -> None:
        super().__init__(
            f"{checkpoint or 'the run'} has taken {step} steps, and num_rollout = {last} counts those too, so that "
            f"nothing is left to do; raise num_rollout above {step}, or give the checkpoint's export (save_hf) as "
            "hf_checkpoint to count from 0"
        )


_BEGAN_AT = "began_at_step"
"""Key in a job's summary: steps that the weights had seen when it began."""
_ATTEMPTS_A_LIFE = 1 << 16
"""Leases of one group that the controller can number between two loads."""


async def load(run: RunState, trainer: Trainer, check: Callable[[], None]) -> Admission:
    """Bring workers and admission to where the newest checkpoint stands, with its version active on the engines.

    `check` raises what ends a wait.
    """
    ready = await _load_workers(run, trainer, check)
    for note in ready.notes:
        await run.report.warn(note)
    run.last = _last_step(run, ready)
    _check_steps_left(run, ready)
    if run.prompts is not None:
        run.prompts.begin_at(ready.data_begins_at)
    if run.recorded is not None:
        run.recorded.begin_at(ready.step, ready.consumed_below, ready.consumed_group_ids)
    if run.publisher.active is not None and ready.step < run.publisher.newest:
        await _drain(run, check)
    run.move_to(ready.step)
    run.checkpoints.find_saved_step(ready)
    await run.history.settle()
    run.history.open_metrics(run.step)
    await _restore_metrics(run, trainer)
    run.evaluations.forget_after(run.step)
    if run.publisher.active != run.step:
        run.dispatcher.hold(LOADING)
    run.dispatcher.release_hold(PREEMPTED)
    admission = await _restore_admission(run, ready)
    run.dispatcher.admit(admission)
    run.step_began = time.monotonic()
    await _publish_loaded_version(run, trainer, check)
    where = ready.checkpoint_dir or "the initial weights"
    await run.report.info(f"loaded {where} at step {ready.step}; {len(admission.ready)} groups in the queue")
    return admission


async def _load_workers(run: RunState, trainer: Trainer, check: Callable[[], None]) -> trainer_pb2.TrainerReady:
    await run.turns.to_trainer(check)
    run.status.enter("loading", "the trainer to load the model")
    with run.activities.during(trainer.worker_id, "load"):
        ready = await run.controls.unless_ended(trainer.start_job())
    await run.turns.to_engines(trainer)
    run.status.enter("loading", "a rollout to load the model")
    while not run.rollouts.connected():
        check()
        await run.dispatcher.wait_for_change()
    return ready


def _last_step(run: RunState, ready: trainer_pb2.TrainerReady) -> int:
    """Return the steps of the run in all: those of the job, unless it is to end earlier.

    Where it began is kept in the job's summary, so that a resumed run ends where it would have.
    """
    steps, most = int(run.history.job.num_rollout), run.config.debug.debug_exit_after_rollout
    began = int(run.history.summary.setdefault(_BEGAN_AT, ready.loaded_step))
    return steps if most is None else min(steps, began + most)


def _check_steps_left(run: RunState, ready: trainer_pb2.TrainerReady) -> None:
    own = pathlib.Path(run.config.checkpoint.save or run.context.run_dir / "checkpoints")
    if nothing_is_left(ready, run.last, own):
        raise NothingLeftError(ready.checkpoint_dir, ready.step, run.last)


def nothing_is_left(ready: trainer_pb2.TrainerReady, last: int, own: pathlib.Path) -> bool:
    """Return whether a run of `last` steps was loaded beyond its end, or from another run's end.

    A run of no steps only evaluates what it loads, and one that has taken steps of its own since still has to end.

    Args:
        own: the run's folder of checkpoints.
    """
    if last == 0:
        return False
    from_elsewhere = bool(ready.checkpoint_dir) and not same_folder(pathlib.Path(ready.checkpoint_dir).parent, own)
    return ready.step > last or (from_elsewhere and ready.step == ready.loaded_step == last)


async def _drain(run: RunState, check: Callable[[], None]) -> None:
    """The trainer is back at older weights: let running groups finish with those they began with, or preempt them."""
    run.dispatcher.hold(LOADING)
    for deadline_s, preempt in ((deadlines.DRAIN_S, False), (deadlines.PREEMPT_S, True)):
        if preempt:
            run.dispatcher.preempt()
        end = time.monotonic() + deadline_s
        while run.dispatcher.training_leases and time.monotonic() < end:
            check()
            await run.dispatcher.wait_for_change()
    run.dispatcher.stop_admitting()


async def _restore_metrics(run: RunState, trainer: Trainer) -> None:
    """Record what the trainer still knows of steps whose metrics were lost with the controller."""
    recorded = run.history.recorded_steps(RESPONSE_TOKENS)
    for step in range(max([-1, *recorded]) + 1, run.step):
        # A trainer that came from a checkpoint answers for the last steps only; older ones stay unknown.
        with contextlib.suppress(WorkerFailedError):
            await run.history.metrics(step, (await trainer.train(step)).metrics)


async def _restore_admission(run: RunState, ready: trainer_pb2.TrainerReady) -> Admission:
    await run.dispatcher.record_drops()
    leases = run.dispatcher.training_leases
    life = await run.queue.begin_life()
    await fence_earlier_controllers(run.queue, run.registry.first_lease_number)
    queued = {entry.group_id: entry.oldest_version for entry in await run.queue.outstanding()}
    batch_size = run.config.data.rollout_batch_size
    return Admission.resume(
        batch_size=batch_size,
        max_staleness=run.config.rollout.max_weight_staleness,
        total_groups=batch_size * run.last,
        version=ready.step,
        consumed_below=ready.consumed_below,
        consumed_ids=ready.consumed_group_ids,
        ready=queued,
        dropped=await run.queue.dropped(),
        leases=leases,
        window=run.config.rollout.over_sampling_batch_size or 0,
        first_attempt=life * _ATTEMPTS_A_LIFE + 1,
    )


async def _publish_loaded_version(run: RunState, trainer: Trainer, check: Callable[[], None]) -> None:
    run.publications.reset(run.last)
    await run.turns.to_trainer(check)
    run.status.enter("loading", f"engines to load version {run.step}")
    await run.publisher.export(trainer, run.step, check)
    await run.publisher.wait_until_active(check)
    if not run.loaded_before:  # time shares are those of the loop; loading models comes once
        run.clock.restart()
        run.loaded_before = True

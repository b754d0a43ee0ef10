"""Parts of a run on their own: dumped rollouts, training without engines, generation without a trainer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from miles.config.schema.section import Derived, Metavar, Positive, Section, derived


class DebugConfig(Section):
    """Dumps of what a run does, and runs of one half of it."""

    save_debug_rollout_data: Annotated[str | None, Derived("with dump_details"), Metavar("FILE")] = None
    """File for the samples of each rollout, written before they are trained on; {rollout_id} in it is the rollout's
    number."""

    load_debug_rollout_data: Annotated[str | None, Metavar("FILE")] = None
    """File with the samples of each rollout to train on, as save_debug_rollout_data names it: nothing is generated, and
    no engine is started. Files that torch.save wrote are read too, if they hold plain values."""

    load_debug_rollout_data_subsample: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the groups of such a file to train on, the first and the last ones; rollout_batch_size is how many."""

    debug_rollout_only: bool = False
    """Generate and score every rollout with the initial weights, without a trainer."""

    debug_train_only: Annotated[bool, Derived("on with load_debug_rollout_data")] = derived()
    """Train without engines and rewards, on load_debug_rollout_data."""

    save_debug_train_data: Annotated[str | None, Derived("with dump_details"), Metavar("FILE")] = None
    """File for what each rank trains on (torch.save of a dict: tokens, masks, advantages, log-probs of its samples);
    {rollout_id} and {rank} in it are the rollout's and the rank's numbers."""

    dump_details: Annotated[str | None, Metavar("DIR")] = None
    """Folder for all of that: rollout_data/, train_data/, and links to the run's metrics, samples and traces."""

    debug_exit_after_rollout: Positive | None = None
    """Number of rollouts after which the run ends, counted from where it began; schedules are those of num_rollout."""

    ci_save_grad_norm: Annotated[str | None, Metavar("FILE")] = None
    """File for the gradient norm of each optimizer step (torch.save of a number); {role}, {rollout_id} and {step_id} in
    it are actor or critic, the rollout's number, and that of the optimizer step in it."""

    ci_load_grad_norm: Annotated[str | None, Metavar("FILE")] = None
    """File to compare the gradient norm of each optimizer step with; the run fails when they differ by more than 3 %
    and 0.03."""

    @property
    def has_engines(self) -> bool:
        """Whether anything is generated."""
        return not self.debug_train_only

    @property
    def has_trainer(self) -> bool:
        """Whether anything is trained."""
        return not self.debug_rollout_only

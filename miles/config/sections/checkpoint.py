"""Checkpoints: what is loaded at the start and saved during the run."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Derived, Metavar, Positive, Section


class CheckpointConfig(Section):
    """Checkpoints."""

    load: Annotated[str | None, Derived("the save folder"), Metavar("DIR")] = None
    """Checkpoint to start from, or a folder of which the newest is taken; the run's own checkpoints come first. Only
    the save folder may hold none yet: the run then starts from hf_checkpoint."""

    save: Annotated[str | None, Derived("RUN_DIR/checkpoints"), Metavar("DIR")] = None
    """Folder for checkpoints."""

    save_interval: Positive | None = None
    """Number of rollouts between checkpoints; not given saves only at the end."""

    async_save: bool = False
    """Write checkpoints in the background while training continues."""

    no_save_optim: bool = False
    """Save checkpoints without the optimizer state."""

    save_hf: Annotated[str | None, Metavar("DIR")] = None
    """Folder in which each checkpoint is also exported in Hugging Face format; `{rollout_id}` stands for the step."""

    ref_load: Annotated[str | None, Derived("hf_checkpoint, when a KL term needs it"), Metavar("DIR")] = None
    """Hugging Face folder of the reference model."""

    critic_load: Annotated[str | None, Derived("hf_checkpoint, with ppo"), Metavar("DIR")] = None
    """Hugging Face folder that the critic is initialised from, such as a reward model of the policy's family; its
    `score.weight` becomes the value head, which is 0 when it is missing."""

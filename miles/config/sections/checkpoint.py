"""What is loaded at the start and saved along the way."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Derived, Metavar, Positive, Section


class CheckpointConfig(Section):
    """Checkpoints."""

    load: Annotated[str | None, Derived("the save folder"), Metavar("DIR")] = None
    """Folder of checkpoints to resume from; the newest is taken. Without one the run starts from hf_checkpoint."""

    save: Annotated[str | None, Derived("RUN_DIR/checkpoints"), Metavar("DIR")] = None
    """Folder to save checkpoints in."""

    save_interval: Positive | None = None
    """Rollouts between checkpoints; not given means only at the end."""

    async_save: bool = False
    """Write checkpoints while training goes on; each is complete, and its samples are done with, a little later."""

    no_save_optim: bool = False
    """Leave the optimizer's state out of checkpoints."""

    save_hf: Annotated[str | None, Metavar("DIR")] = None
    """Folder in which each checkpoint is also written in Hugging Face form; `{rollout_id}` stands for the step."""

    ref_load: Annotated[str | None, Derived("hf_checkpoint, when a KL term needs it"), Metavar("DIR")] = None
    """Hugging Face folder of the reference model."""

    opd_teacher_load: Annotated[str | None, Metavar("DIR")] = None
    """Hugging Face folder of the teacher (use_opd): a model with the policy's vocabulary, and with train_backend
    megatron of the policy's shape."""

    critic_load: Annotated[str | None, Derived("hf_checkpoint, with ppo"), Metavar("DIR")] = None
    """Hugging Face folder that the critic starts from, such as a reward model's of the policy's family. Its
    `score.weight` of one row is the value head, which starts at 0 where there is none."""

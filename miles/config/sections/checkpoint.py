"""Checkpoints: what is loaded at the start and saved during the run."""

from __future__ import annotations

from typing import Annotated, Literal

from miles.config.schema.section import Derived, Metavar, NonNegative, Positive, Section, States


class CheckpointConfig(Section):
    """Checkpoints."""

    load: Annotated[str | None, Derived("the save folder"), Metavar("DIR")] = None
    """Checkpoint to start from, or a folder of which the newest is taken; the run's own checkpoints come first. Only
    the save folder may hold none yet: the run then starts from ref_load if that is a torch_dist checkpoint, else from
    hf_checkpoint. A Megatron-LM checkpoint (torch_dist) gives its weights alone (megatron)."""

    save: Annotated[str | None, Derived("RUN_DIR/checkpoints"), Metavar("DIR")] = None
    """Folder for checkpoints."""

    save_interval: Positive | None = None
    """Number of rollouts between checkpoints; not given saves only at the end."""

    save_retain_interval: Positive | None = None
    """Keep the checkpoints of every so many rollouts, and the newest one; others are deleted once a newer one is
    complete. Not given keeps all."""

    async_save: bool = False
    """Write checkpoints in the background while training continues."""

    no_save_optim: bool = False
    """Save checkpoints without the optimizer state."""

    save_hf: Annotated[str | None, Metavar("DIR")] = None
    """Folder in which each checkpoint is also exported in Hugging Face format; `{rollout_id}` stands for the step."""

    save_hf_format: Literal["as_trained", "rollout"] = "as_trained"
    """Weights of exports: in rollout_dtype (as_trained), or quantised as those of the engines are (rollout)."""

    ref_load: Annotated[str | None, Derived("hf_checkpoint, when a KL term needs it"), Metavar("DIR")] = None
    """Hugging Face folder of the reference model; or, with train_backend megatron, a torch_dist checkpoint, which also
    gives the policy its first weights."""

    ref_ckpt_step: NonNegative | None = None
    """Iteration of the Megatron-LM checkpoint in ref_load; not given takes the one it names as the newest."""

    finetune: bool = False
    """State that load gives weights alone, as it does for a Megatron-LM checkpoint."""

    no_load_optim: bool = False
    """State that load gives no optimizer state, as a Megatron-LM checkpoint does not."""

    no_load_rng: bool = False
    """State that load gives no random states, as a Megatron-LM checkpoint does not."""

    ckpt_format: Annotated[
        Literal["torch", "torch_dist", "torch_dcp", "fsdp_dtensor"] | None,
        States("torch_dist", "checkpoints of the megatron backend are torch_dist, and others are not read"),
    ] = None
    """Format of Megatron's checkpoints."""

    auto_detect_ckpt_format: Annotated[bool | None, States(True, "the files of a checkpoint tell its format")] = None
    """Find out the format of the checkpoint in load."""

    critic_load: Annotated[str | None, Derived("hf_checkpoint, with ppo"), Metavar("DIR")] = None
    """Hugging Face folder that the critic is initialised from, such as a reward model of the policy's family; its
    `score.weight` becomes the value head, which is 0 when it is missing. With train_backend megatron also a torch_dist
    checkpoint, without a value head."""

"""Disk: checkpoints, exports and recorded samples."""

from __future__ import annotations

import math

from miles.memory.amount import Part, size
from miles.memory.fsdp import adapter_parameters
from miles.memory.run import Run

_SAMPLE_TOKEN_BYTES = 40
"""Of a recorded token: its text, id, mask, advantage and two log-probabilities, as JSON."""


def disk_part(run: Run) -> Part:
    """Return what the run writes in all; no checkpoint is removed."""
    s, total = run.settings, run.policy.parameters.total
    steps = s.num_rollout or 0
    saves = (math.ceil(steps / s.save_interval) if s.save_interval else 1) if steps else 0
    exports = saves if "{" in (s.save_hf or "") else min(saves, 1)  # without save_hf, one at the end
    each = run.master_bytes * (1 if s.no_save_optim else 3)
    if s.train_backend == "megatron" and run.train_bytes == 2:  # rounded weights, beside float32 masters and moments
        each = 2 + (0 if s.no_save_optim else 12)
    trained = 2 * total if run.has_critic else total
    if s.lora_rank:
        trained = adapter_parameters(run.policy.shape, s.lora_rank) if run.policy.shape is not None else 0
    checkpoint, export = trained * each, run.published.bytes
    tokens = steps * s.log_samples_per_step * s.n_samples_per_prompt * (s.rollout_max_response_len or 0)
    samples = tokens * _SAMPLE_TOKEN_BYTES
    formula = (
        f"{saves} checkpoints × {size(checkpoint)} + {exports} exports × {size(export)} + {size(samples)} of samples"
    )
    return Part("disk", saves * checkpoint + exports * export + samples, formula)

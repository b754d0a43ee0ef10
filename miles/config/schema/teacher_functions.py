"""The functions by which recipes ask a teacher behind SGLang servers; here the settings of distillation alone do."""

from __future__ import annotations

from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

SCORES = tuple(f"{package}.rollout.on_policy_distillation.reward_func" for package in ("miles", "slime"))
"""Names of the reward that asks the teacher."""
POST_PROCESSES = tuple(
    f"{package}.rollout.on_policy_distillation.post_process_rewards" for package in ("miles", "slime")
)
"""Names of what turns its answer into log-probabilities and a reward of 0."""
_NAMES = {"custom_rm_path": SCORES, "custom_reward_post_process_path": POST_PROCESSES}


def take_teacher_functions(s: FlatSettings) -> list[Fault]:
    """Leave out the functions that mean the teacher; return faults where another setting contradicts them."""
    taken = [key for key in _NAMES if s.has(key) and s.is_valid(key) and getattr(s, key) in _NAMES[key]]
    faults = []
    for key in taken:
        name = getattr(s, key)
        if not s.use_opd or s.opd_type != "sglang":
            problem = "it asks the teacher of on-policy distillation"
            faults.append(Fault(key, name, problem, "set use_opd, and opd_type to sglang, or leave it out"))
            s.refuse(key)
        elif s.rm_type is not None:
            problem = f"with {name} in {key} every reward is 0"
            faults.append(
                Fault("rm_type", s.rm_type, problem, "leave one of them out; use_opd asks the teacher anyway")
            )
            s.refuse(key)
        else:
            s.fill(key, None)
    return faults

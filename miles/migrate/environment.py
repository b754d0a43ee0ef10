"""What becomes of the environment variables that a script gives its training program."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

from miles.config.schema.catalog import catalog
from miles.config.schema.precision_variables import GROUP_SIZE, INT4, SCALES, VARIABLES
from miles.migrate.open_values import is_open

_TRAINER = re.compile(r"(NVTE|NCCL|TORCH|PYTORCH|CUBLAS|CUDNN|TRITON|GLOO|NVSHMEM|UB)_\w+|CUDA_DEVICE_MAX_CONNECTIONS")
_SERVICES = re.compile(r"SGLANG_\w+|HF_\w+|TOKENIZERS_PARALLELISM|TENSORBOARD_DIR|CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH")
_FORMATS = (
    (SCALES, "it is of training in FP8, which the flags do not ask for"),
    (INT4, "it is off"),
    (GROUP_SIZE, f"it is of {INT4}, which is off"),
)
_NEEDLESS: Mapping[str, str] = {
    r"PYTHONPATH": "programs are found without it; add folders of your own functions to it before the start",
    r"PYTHONUNBUFFERED|PYTHONFAULTHANDLER": "services write their logs at once",
    r"MASTER_ADDR|MASTER_PORT|NODE_RANK|WORLD_SIZE|RANK": "the launcher says where processes meet (docs/nodes.md)",
    r"(?i:no_proxy|http_proxy|https_proxy)": "services call each other without a proxy",
    r"RAY_\w+": "there is no Ray",
    r"(SLIME|MILES)_\w+": "it configures the other program",
    r"WANDB_\w+": "it is read from the environment, if at all",
}


@dataclasses.dataclass(slots=True)
class Environment:
    """Variables, sorted by who needs them."""

    trainer: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the trainer's processes: the setting train_env_vars."""
    exported: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of all services, which inherit the environment of the launcher."""
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why a variable is not set, by its name."""


def sort_environment(variables: Mapping[str, str], settings: Collection[str] = ()) -> Environment:
    """Sort the variables of a script. Those that are open are left out: NCCL and PyTorch decide themselves.

    Args:
        settings: Those that variables of formats are here (`precision_variables`).
    """
    found = Environment()
    for name, why in _FORMATS:
        if name in variables and not is_open(variables[name]):
            key = VARIABLES[name]
            found.left_out[name] = f"it is {catalog()[key].flag} here" if key in settings else why
    variables = {name: value for name, value in variables.items() if name not in found.left_out}
    for name, value in variables.items():
        if is_open(value):
            found.left_out[name] = (
                "its value is not known here; set it in the environment of the launcher if it is needed"
            )
        elif _TRAINER.fullmatch(name):
            found.trainer[name] = value
        elif _SERVICES.fullmatch(name):
            found.exported[name] = value
        else:
            reasons = (why for pattern, why in _NEEDLESS.items() if re.fullmatch(pattern, name))
            found.left_out[name] = next(reasons, "nothing here reads it")
    return found

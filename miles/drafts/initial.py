"""The EAGLE-3 head that a run begins with when none is given: made once, by whoever needs it first.

Its numbers follow from the policy's folder and the run's seed alone, so that hosts that do not share the run's folder
make the same one.
"""

from __future__ import annotations

import pathlib
import shutil
import uuid
from typing import TYPE_CHECKING

from miles.config.speculation import DraftKind, speculation_of
from miles.drafts.folders import initial_dir

if TYPE_CHECKING:
    from miles.config import JobConfig


def ensure_initial(config: JobConfig) -> None:
    """Make the head that the configuration names, unless it is there already or is another's.

    Raises ValueError for a policy that no head fits.
    """
    speculation = speculation_of(config.rollout.sglang_args)
    folder = initial_dir(pathlib.Path(config.services.run_dir))
    if speculation.kind is not DraftKind.EAGLE3 or speculation.draft_model_path != str(folder) or folder.is_dir():
        return
    from miles.drafts.new_head import write_new_head

    # Not the process id: containers that share the folder have the same ones.
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_new_head(pathlib.Path(str(config.rollout.hf_checkpoint)), partial, config.train.seed)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)

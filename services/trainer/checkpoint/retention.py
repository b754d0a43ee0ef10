"""Which checkpoints are kept when a newer one is complete, and the deletion of the others."""

from __future__ import annotations

import logging
import pathlib
import shutil

from miles.checkpoint_folder import newest, step_of

logger = logging.getLogger(__name__)

_DOOMED = ".deleted"


def discard_passed(folder: pathlib.Path, every: int) -> list[pathlib.Path]:
    """Delete the checkpoints before the newest complete one whose step is no multiple of `every`; say which.

    One that cannot be deleted is left for the next time. A folder loses its name first, so that nobody takes what is
    left of it for a checkpoint.
    """
    last = newest(folder).checkpoint
    steps = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None}
    if last is None or last not in steps:
        return []
    passed = sorted(path for path, step in steps.items() if step < steps[last] and step % every)
    try:
        for path in passed:
            path.rename(path.with_name(path.name + _DOOMED))
        for path in folder.glob(f"step_*{_DOOMED}"):
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("a checkpoint that save_retain_interval does not keep could not be deleted: %s", error)
    gone = [path for path in passed if not path.exists()]
    if gone:
        names = ", ".join(path.name for path in gone)
        logger.info("deleted %s in %s: save_retain_interval = %d, and %s is complete", names, folder, every, last.name)
    return gone

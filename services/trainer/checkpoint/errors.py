"""Whatever reading or writing a checkpoint raises, as one error that names it.

PyTorch's CheckpointException is not an Exception, and readers raise anything from KeyError to RuntimeError for a file
that was cut short.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException


class MisfitError(ValueError):
    """A checkpoint is of another model or other settings than the run."""


@contextlib.contextmanager
def reading(directory: pathlib.Path) -> Iterator[None]:
    """Raise ValueError that names the checkpoint for whatever its readers raise; a misfit stays as it is."""
    try:
        yield
    except (MisfitError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        remedy = "resume with its own model, copy it again, or remove its folder to go on from an older one"
        raise ValueError(f"{directory} cannot be read ({cause_of(error)}); {remedy}") from error


@contextlib.contextmanager
def reading_model(folder: pathlib.Path) -> Iterator[None]:
    """Raise ValueError that names a model's folder for whatever its readers raise, unless memory has run out."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        remedy = "copy it again, or give a complete Hugging Face checkpoint"
        raise ValueError(f"the model in {folder} cannot be read ({cause_of(error)}); {remedy}") from error


@contextlib.contextmanager
def writing(directory: pathlib.Path, partial: pathlib.Path | None = None) -> Iterator[None]:
    """Raise OSError that names the checkpoint or export for whatever its writers raise.

    Rank 0 removes what was written, which may have filled the disk: `partial`, by default that of a checkpoint.
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        free_mb = shutil.disk_usage(next(each for each in directory.absolute().parents if each.is_dir())).free / 1e6
        if dist.get_rank() == 0:
            shutil.rmtree(partial or directory.with_name(directory.name + ".tmp"), ignore_errors=True)
        why = f"{cause_of(error)}; the disk had {free_mb:.1f} MB free"
        raise OSError(f"{directory} could not be written ({why}); older ones are as they were") from error


def cause_of(error: BaseException) -> str:
    """Describe an error in one line; PyTorch's by what failed on the first rank."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items(), key=lambda each: each[0])
        return f"rank {rank}: {cause_of(cause)}"
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text if len(text) <= 400 else text[:400] + '…'}" if text else name

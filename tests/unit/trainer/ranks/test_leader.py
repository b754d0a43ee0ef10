"""What the leader's thread raises reaches the caller, whatever it is."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from miles.services.trainer.ranks.collective_calls import Command, Ranks
from miles.services.trainer.ranks.leader import Leader
from miles.services.trainer.ranks.worker import RankWorker
from miles.threads import EscapedError

pytestmark = pytest.mark.usefixtures("process_group")


class Loading(RankWorker):
    """A rank whose command fails as a checkpoint reader does."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(torch.device("cpu"))
        self._error = error

    def run(self, command: Command, **local: object) -> object:
        if command.name == "start":
            raise self._error
        return command.name


@pytest.mark.parametrize(
    "error", [CheckpointException("cut short", {}), SystemExit(3), KeyboardInterrupt(), MemoryError("full")]
)
async def test_a_command_that_raises_anything_fails_and_the_next_one_runs(error: BaseException) -> None:
    leader = Leader(Ranks(), Loading(error))
    with pytest.raises((EscapedError, MemoryError), match=r"CheckpointException|SystemExit|KeyboardInterrupt|full"):
        await leader.run(Command("start"))
    assert await leader.run(Command("stop")) == "stop"
    assert leader.close(60)

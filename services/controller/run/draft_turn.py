"""Whether a run's draft trainer has to be off the GPUs, and telling it so."""

from __future__ import annotations

import asyncio
import logging

from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError
from miles.services.controller.clients.draft_trainer import DraftTrainerClient
from miles.services.controller.run.alerts import RunAlerts

logger = logging.getLogger(__name__)


class DraftTurn:
    """The trainer's turn, while `held`, in which drafts are neither trained nor loaded on a GPU."""

    def __init__(self, alerts: RunAlerts) -> None:
        self.held = False
        self._alerts = alerts
        self._telling = asyncio.Lock()
        """One call at a time, so that what the draft trainer hears last is what holds."""

    async def tell(self, client: DraftTrainerClient) -> None:
        """Return once it has left its GPU, or was told to go on, as it is now; people are told if it cannot leave."""
        if not client.has_gpu:
            return
        async with self._telling:
            held = self.held
            try:
                if held:
                    released = await client.hold(release_memory=True)
                    logger.info("%s has left its GPU (%.2f GB)", client.worker_id, released / 1e9)
                else:
                    await client.go_on()
            except (WorkerLostError, WorkerFailedError) as error:
                if held:
                    problem = f"could not be held, and may be in the trainer's way: {error}"
                    self._alerts.warn(f"{client.worker_id} {problem}")
                else:
                    logger.info("draft trainer %s: %s", client.worker_id, error)  # whoever follows it notices a loss

"""Publishes versions of the draft model on the draft stream of the weight-sync service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2_grpc
from miles.telemetry.tracing import traced

if TYPE_CHECKING:
    import torch

    from miles.config import JobConfig
    from miles.services.trainer.drafts.protocol import Learner
    from miles.weights import PublishResult


class DraftPublisher:
    """Publishes one job's drafts. Called by one thread alone."""

    def __init__(self, config: JobConfig, job_id: str, weightsync_address: str, device: torch.device) -> None:
        """The service chooses the transport: what is best for the policy, which update_weight_transfer_mode says, may
        be out of reach for this process, which is no rank of the trainer."""
        from miles.weights import WeightPublisher
        from miles.weights.base import Endpoint

        self._channel = connect_blocking(weightsync_address)
        self._publisher = WeightPublisher(
            weightsync_pb2_grpc.WeightSyncServiceStub(self._channel),
            job_id,
            policy_pb2.WEIGHT_STREAM_DRAFT,
            endpoint=Endpoint(weightsync_address, device),
            bucket_bytes=config.weights.update_weight_buffer_size,
        )

    @traced("publish draft", lambda self, version, *_: version)
    def publish(self, version: int, train_step: int, learner: Learner) -> PublishResult:
        """Publish the model as it is; a number that was published before is replaced.

        Raises grpc.RpcError when the service refuses or does not answer, and OSError when there is no room.
        """
        return self._publisher.publish(version, train_step, learner.layout(), learner.export())

    def close(self) -> None:
        """Close the transports and the connection."""
        self._publisher.close()
        self._channel.close()

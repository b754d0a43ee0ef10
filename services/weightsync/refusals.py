"""How calls that cannot be served end: which gRPC status each error becomes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import NoReturn

import grpc
import grpc.aio

from miles.rpc import abort
from miles.rpc.gen import policy_pb2
from miles.services.weightsync.segments import OutOfMemory
from miles.services.weightsync.transport_choice import NoTransport
from miles.services.weightsync.version import Refused, UnknownVersion
from miles.weights import manifest as manifests

STREAMS = (policy_pb2.WEIGHT_STREAM_POLICY, policy_pb2.WEIGHT_STREAM_DRAFT)
"""The streams that a job can have."""


@contextlib.asynccontextmanager
async def refusals_as_status(
    context: grpc.aio.ServicerContext, what: str, version: policy_pb2.WeightVersion
) -> AsyncIterator[None]:
    """End the call with a status that says why this version could not be served; `what` is a verb for the message."""
    try:
        yield
    except NoTransport as error:
        await abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except OutOfMemory as error:
        await abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    except manifests.ManifestError as error:
        await invalid(context, f"manifest: {error}")
    except Refused as error:
        unknown = isinstance(error, UnknownVersion)
        code = grpc.StatusCode.NOT_FOUND if unknown else grpc.StatusCode.FAILED_PRECONDITION
        await abort(context, code, f"cannot {what} {manifests.describe(version)}: {error}")


async def check_version(version: policy_pb2.WeightVersion, context: grpc.aio.ServicerContext) -> None:
    """End the call with INVALID_ARGUMENT unless the version names a job and a stream."""
    faults = [] if version.job_id else ["job_id is empty"]
    if version.stream not in STREAMS:
        faults.append(f"stream is {version.stream}; allowed are POLICY and DRAFT")
    if faults:
        await invalid(context, "; ".join(faults))


async def invalid(context: grpc.aio.ServicerContext, text: str) -> NoReturn:
    """End the call with INVALID_ARGUMENT."""
    await abort(context, grpc.StatusCode.INVALID_ARGUMENT, text)

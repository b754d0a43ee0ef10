"""gRPC for all services: servers, channels, worker attachments, exit codes; generated stubs are in `miles.rpc.gen`.

It knows the controller's contract of attachments and no other. Start at `server`.
"""

from miles.rpc.attachment import WorkerAttachment
from miles.rpc.channel import connect, connect_blocking, connected, wait_ready
from miles.rpc.exit_codes import ExitCode, ServiceExit
from miles.rpc.server import main, start_server
from miles.rpc.status import abort

__all__ = [
    "ExitCode",
    "ServiceExit",
    "WorkerAttachment",
    "abort",
    "connect",
    "connect_blocking",
    "connected",
    "main",
    "start_server",
    "wait_ready",
]

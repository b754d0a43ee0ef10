"""A process with a gRPC server may fork: PyTorch does so to share memory."""

from __future__ import annotations

import os
import subprocess
import sys

FORKS = """
import asyncio, os
import miles
import grpc.aio

async def main():
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    def fork():
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
    await asyncio.to_thread(fork)
    await server.stop(0)

asyncio.run(main())
"""


def test_grpc_leaves_forks_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    ran = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    assert "fork()" not in ran.stderr

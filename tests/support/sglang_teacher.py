"""A teacher's server: SGLang on the CPU, with a key."""

from __future__ import annotations

import pathlib
import socket

from sglang_kit import CPU_FLAGS, CPU_PYTHON

from miles.services.rollout.engines.sglang.server.process import ServerProcess

KEY = "secret of the teacher"


def free_port() -> int:
    """A port of the loopback device that nothing listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def command(folder: pathlib.Path, port: int) -> list[str]:
    """Start a server of a Hugging Face folder with it."""
    flags = {**CPU_FLAGS, "model_path": folder, "host": "127.0.0.1", "port": port, "api_key": KEY, "device": "cpu"}
    flags |= {"dtype": "float32", "sleep_on_idle": None, "skip_server_warmup": None}
    words = [
        word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value) if word is not None
    ]
    return [str(word) for word in (CPU_PYTHON, "-m", "sglang.launch_server", *words)]


async def start_teacher(folder: pathlib.Path, port: int) -> ServerProcess:
    """Start one; it answers some time later."""
    return await ServerProcess.start(command(folder, port), folder.with_suffix(".log"))

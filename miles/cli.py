"""The `miles` command: dispatches to its subcommands, whose modules are imported on demand."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from miles.standard_streams import escape_unknown_characters, open_missing

_JOB = "miles.client.commands.act"
COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("miles.launcher.serve", "start every service on this machine and wait for jobs"),
    "trainer-node": ("miles.launcher.trainer_node", "run the trainer's ranks on a node other than the first"),
    "doctor": ("miles.doctor.command", "check this machine, and a configuration on it, before anything is started"),
    "plan": ("miles.launcher.plan_command", "what starts where in a run, and the memory that each GPU needs for it"),
    "submit": ("miles.client.commands.submit", "submit a job to a gateway"),
    "list": ("miles.client.commands.list", "jobs, newest first"),
    "show": ("miles.client.commands.show", "one job: its state, results and settings"),
    "watch": ("miles.client.commands.watch", "watch a job until it ends"),
    "pause": (f"{_JOB}:pause", "pause a job; its workers stay loaded"),
    "resume": (f"{_JOB}:resume", "resume a job that was paused, was stopped or has failed"),
    "stop": (f"{_JOB}:stop", "save a checkpoint and end the job; it can be resumed"),
    "cancel": (f"{_JOB}:cancel", "end a job for good, without saving"),
    "checkpoint": (f"{_JOB}:checkpoint", "save a checkpoint and continue the job"),
    "checkpoints": ("miles.client.commands.checkpoints", "checkpoints of a job; --download STEP downloads one"),
    "metrics": ("miles.client.commands.metrics", "per-step metrics of a job"),
    "samples": (
        "miles.client.commands.samples",
        "samples that a job trained on; `samples check PATH` checks recorded ones",
    ),
    "workers": ("miles.client.commands.workers", "worker processes, with health, load and weight version"),
    "versions": ("miles.client.commands.versions", "versions of a job's weights, and what each engine holds"),
    "logs": ("miles.client.commands.logs", "logs of the services"),
    "trace": ("miles.telemetry.trace_command", "where the time of a traced step went"),
    "keys": ("miles.gateway.keys_command", "create, list and revoke API keys of a gateway"),
    "convert": (
        "miles.services.trainer.convert",
        "convert weights: published folders, Megatron-Core checkpoints",
    ),
    "migrate": ("miles.migrate.command", "the command for here from a launch script of miles or slime"),
    "config": (
        "miles.launcher.config_command",
        "reference page of all settings, and the configuration of a command line",
    ),
}
"""Module, or module:function, and help text by command. The function (`main` by default) takes the remaining arguments
and returns the exit code."""

_INTERNAL, _OUTPUT_CLOSED = 1, 141
"""Exit codes of `miles.rpc.exit_codes`, whose import takes longer than `miles --help` should."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        from miles import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        meant = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        print(f"miles: there is no command {words[0]}{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[words[0]][0].partition(":")
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C ends us without a traceback
    command = getattr(importlib.import_module(module), function or "main")
    signal.signal(signal.SIGINT, handler)
    open_missing()
    escape_unknown_characters()
    try:
        code = int(command(words[1:]))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `miles list | head`
        _discard_output()
        return _OUTPUT_CLOSED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        _discard_output()
        print(f"miles: the output cannot be written: {error.strerror}", file=sys.stderr)
        return _INTERNAL


def _discard_output() -> None:
    """Have the interpreter's last flush go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _usage() -> str:
    lines = ["usage: miles COMMAND ...", ""]
    lines += [f"  {name:<13}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "`miles COMMAND --help` shows its arguments."])


if __name__ == "__main__":
    sys.exit(main())

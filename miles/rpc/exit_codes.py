"""Exit codes: one per cause, with a help text."""

from __future__ import annotations

import enum


@enum.unique
class ExitCode(enum.IntEnum):
    """Process exit codes of every program of the project."""

    OK = 0
    INTERNAL = 1
    BAD_CONFIG = 2
    PORT_IN_USE = 10
    REDIS_UNREACHABLE = 11
    REDIS_UNSUITABLE = 12
    CONTROLLER_UNREACHABLE = 13
    GATEWAY_UNREACHABLE = 14
    REFUSED = 15
    REDIS_REFUSED = 16
    TLS_FAILED = 17
    NOT_A_CONTROLLER = 18
    REDIS_IN_USE = 19
    MODEL_UNUSABLE = 20
    DATA_UNUSABLE = 21
    MACHINE_UNSUITABLE = 22
    WORKER_FAILED = 30
    JOB_FAILED = 31
    JOB_CANCELLED = 32
    RUN_DIR_BUSY = 33
    NOT_SAVED = 34
    INTERRUPTED = 130
    OUTPUT_CLOSED = 141


HELP: dict[ExitCode, str] = {
    ExitCode.OK: "Done.",
    ExitCode.INTERNAL: "Unexpected error; the traceback is in the log.",
    ExitCode.BAD_CONFIG: "The configuration has faults; each is listed with its remedy.",
    ExitCode.PORT_IN_USE: "A port is taken; choose another one, or 0 for any free one.",
    ExitCode.REDIS_UNREACHABLE: "Redis does not answer; check --redis-url and that the server runs.",
    ExitCode.REDIS_UNSUITABLE: "Redis is older than 6.2, a cluster, a replica, or may evict keys; use another server.",
    ExitCode.CONTROLLER_UNREACHABLE: "The controller does not answer; check its address and log.",
    ExitCode.GATEWAY_UNREACHABLE: "The gateway does not answer; check --url and that it runs.",
    ExitCode.REFUSED: "The gateway refused the request; the message says what to do.",
    ExitCode.REDIS_REFUSED: "Redis refuses the password, the user or the database, or what listens there is no Redis.",
    ExitCode.TLS_FAILED: "No TLS connection comes about; check certificates, authority and names on both sides.",
    ExitCode.NOT_A_CONTROLLER: "What listens at the controller's address is another program; check --controller.",
    ExitCode.REDIS_IN_USE: "Another controller uses this Redis; stop it, or give each a server or database of its own.",
    ExitCode.MACHINE_UNSUITABLE: "`miles doctor` or `miles plan` found what a run cannot do with; see its remedies.",
    ExitCode.MODEL_UNUSABLE: "The model folder is missing or incomplete; see the message for what is missing.",
    ExitCode.DATA_UNUSABLE: "The prompt data cannot be used; see the message for the file and line.",
    ExitCode.WORKER_FAILED: "A service kept failing and was not restarted any more; its log says why.",
    ExitCode.JOB_FAILED: "The job ended with an error; the message and the logs say why.",
    ExitCode.JOB_CANCELLED: "The job was cancelled.",
    ExitCode.RUN_DIR_BUSY: "Another run has the run folder, save or save_hf; stop it or choose another folder.",
    ExitCode.NOT_SAVED: (
        "Stopped by Ctrl-C or SIGTERM, but the last steps could not be saved; the message says what hung. The same "
        "command resumes the run from its newest checkpoint."
    ),
    ExitCode.OUTPUT_CLOSED: "Nobody reads the output any more.",
    ExitCode.INTERRUPTED: (
        "Stopped by Ctrl-C or SIGTERM, with the state saved unless a second one came; the same command resumes the run."
    ),
}


class ServiceExit(Exception):
    """Ends a program with `code`; the message is for the operator."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code

"""What happens to parts of a run that fail: they are restarted, always."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Metavar, Section, States


class FaultToleranceConfig(Section):
    """Statements about restarts. How servers are probed is with the engine's settings."""

    use_fault_tolerance: Annotated[
        bool | None, States(True, "servers and services that end or hang are restarted in every run")
    ] = None
    """Restart what fails. It always is."""

    ft_components: Annotated[tuple[str, ...], Metavar("{rollout,train} ...")] = ()
    """Parts of a run that are restarted. All of them are: the rollouts, the trainer, and every other service."""

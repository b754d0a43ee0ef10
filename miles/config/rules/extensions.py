"""Rules about functions of users."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import needs, rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings


@rule
def generate_functions_go_together_with_the_rest(s: FlatSettings) -> Iterator[Fault]:
    yield from needs(s, "custom_generate_timeout_s", "custom_generate_function_path")
    if not s.custom_generate_function_path:
        return
    path = f"custom_generate_function_path = {s.custom_generate_function_path}"
    if s.partial_rollout:
        problem = f"{path} cannot be resumed in the middle of a trajectory"
        yield Fault("partial_rollout", True, problem, "leave it out; unfinished trajectories go on over weight updates")
    for key in ("use_rollout_routing_replay", "observe_rollout_routing"):
        if getattr(s, key):
            problem = f"{path} makes several requests, whose recorded experts are not joined"
            yield Fault(key, True, problem, "leave it out; use_routing_replay replays the trainer's own routing")

"""Rollout routing replay: the experts chosen while sampling, replayed in Megatron-Core's routers.

Start at `step_routing`.
"""

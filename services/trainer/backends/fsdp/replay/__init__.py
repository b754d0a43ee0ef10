"""Rollout routing replay: the experts chosen while sampling, replayed in the routers of Hugging Face models.

Start at `step_routing`.
"""

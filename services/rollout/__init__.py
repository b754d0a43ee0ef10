"""A rollout worker: one inference engine, and the prompt groups that it generates and scores.

It never decides what is trained on. Start at `service`, then `groups.runner`.
"""

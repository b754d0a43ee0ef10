"""The rollout service: an inference engine for each job, and the prompt groups that it generates and scores.

It never decides what is trained on. Start at `service`, then `job` and `groups.group_run`.
"""

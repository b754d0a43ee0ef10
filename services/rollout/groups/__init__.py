"""The run of a prompt group, from its lease to the queue: generate, score, filter, put.

Nothing here decides what is trained on. Start at `group_run`; `response_sampler` is where ways of generating plug in.
"""

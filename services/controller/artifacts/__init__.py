"""Reads what runs left on disk: metrics, samples, logs, checkpoints, tokens.

Nothing here writes, and nothing here runs in the event loop. Start at `service`.
"""

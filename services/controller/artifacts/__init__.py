"""Reads what runs left on disk: metrics, samples, logs, checkpoints, tokens.

Nothing here writes but `log_spans`, and no file is read in the event loop. Start at `service`.
"""

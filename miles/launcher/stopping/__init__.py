"""Stopping a run on Ctrl-C: what it waits for, what it prints meanwhile, and what it kills in the end.

Start at `stop_progress`, the rules; `stop_run` carries them out.
"""

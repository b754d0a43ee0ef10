"""Trackers: where metrics go besides metrics.jsonl, each behind a thread that keeps a slow or dead one from the run.

A tracker never decides anything: what it cannot take is warned about, and metrics.jsonl has all of it. Start at `base`.
"""

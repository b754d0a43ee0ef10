"""The REST API and web page: API keys, limits, jobs, and reading results of runs.

It has no training logic and never touches Redis. Start at `app`.
"""

"""Jobs from submission to their end: which runs, what it needs, what is recorded of it.

The steps of a run are in `run`. Start at `scheduler`.
"""

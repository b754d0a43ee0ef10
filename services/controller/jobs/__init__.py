"""Jobs from submission to end: which one runs, which workers it needs, and its record.

The steps of a run are in `run`. Start at `scheduler`.
"""

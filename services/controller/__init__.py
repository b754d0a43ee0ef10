"""The controller: jobs, the run loop, admission, workers, recovery. It never touches a tensor.

Start at `service` for its API, at `run.loop` for the steps of a run.
"""

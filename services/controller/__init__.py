"""The controller: jobs, the run loop, admission, workers, recovery. It never touches a tensor.

Start at `service` for what it is asked, at `run.loop` for what it does.
"""

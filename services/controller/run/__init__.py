"""The steps of one job: admit, generate, train, publish, over and over.

No tensors and no disk. Start at `loop`. `admission` has the rules and `dispatcher` carries them out; `recovery` runs
the loop again after a loss, and `resume` is how the loop begins.
"""

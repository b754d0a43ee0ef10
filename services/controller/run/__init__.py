"""The steps of one job: admit, generate, train, publish, over and over.

No tensors and no disk. Start at `loop`; `admission` has the rules, `dispatcher` carries them out, `recovery` is around
the loop, and `resume` is its beginning.
"""

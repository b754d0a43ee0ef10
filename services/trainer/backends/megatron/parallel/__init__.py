"""What depends on the parallel layout: process groups, a rank's rows of a micro-batch, the pipeline, and its outputs.

Start at `groups`.
"""

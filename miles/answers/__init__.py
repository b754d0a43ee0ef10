"""Reads answers: which part of a response is its answer, and what a label says. Text alone, nothing is evaluated.

The built-in rewards and the check of labels before a run start from it. Start at `final`.
"""

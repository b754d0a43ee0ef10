"""What training steps leave for the draft trainer: hidden states and likeliest tokens of their own forward passes.

Nothing is computed again for it, and nothing that is trained depends on it. Begin with `recorder.py`.
"""

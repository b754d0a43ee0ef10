"""Draft models of speculative decoding: what they are made of, learn from, and how.

The draft trainer trains them and engines draft with them; neither is imported here. Begin with `recording.py`, what the
trainer leaves behind of its forward passes.
"""

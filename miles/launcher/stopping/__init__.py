"""How a run ends when its user asks: what is waited for, what is said meanwhile, and what is killed in the end.

Start at `rules`.
"""

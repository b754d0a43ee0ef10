"""Generation requests: which server gets each, how SGLang is asked, and how its answers are read.

Nothing here starts servers or changes weights. Start at `dispatcher`.
"""

"""Generation requests: how SGLang spells them, which server gets which, and what comes back.

Start at `payload`.
"""

"""Inference engines, one folder each. Nothing here decides what to generate or which version to serve.

`base` is what an engine has to offer, `registry` where one is added. Start at `base`.
"""

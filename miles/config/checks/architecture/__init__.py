"""Compares what launch scripts say of a model under Megatron's names with its config.json.

Start at `compare`; `table` has which key of config.json a setting is compared with.
"""

"""Which folders a run owns: a file in each says whose it is, and nobody else writes into it or deletes it.

The rules, without the settings of a configuration (those are in `miles.config.checks.outputs`). Start at `owner_file`.
"""

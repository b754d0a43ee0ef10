"""Starts the services of a run on one machine, watches them, shows progress, and stops them.

It starts services by module name and never imports one. Start at `main` (`train.py`) and `cluster`.
"""

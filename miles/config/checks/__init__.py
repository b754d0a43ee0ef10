"""Checks of a configuration on this machine, before anything starts: files, functions, ports, devices.

They start and write nothing. Start at `environment`.
"""

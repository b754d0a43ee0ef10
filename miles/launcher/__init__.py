"""Starts the services of a run on one machine, watches them, shows progress, and stops them."""

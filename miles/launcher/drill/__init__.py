"""Kills services of a running cluster on purpose, and measures how long each takes to come back. Start at `drill`."""

"""Kills services of a running cluster on purpose, and measures how long each takes to recover. Start at `drill`."""

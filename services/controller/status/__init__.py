"""What a run is doing now, for people who look at it. Nothing here changes a run. Start at `run_status`."""

"""Shows what a run and its workers are doing now. Nothing here changes a run. Start at `run_status`."""

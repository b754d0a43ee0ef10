"""Whether an engine may serve now: its weights, its pauses, its quarantine. Start at `readiness`."""

"""Which request computes what next, and which token it gets. Nothing here knows a model. Start at `generator`."""

"""Built-in rewards as a service. Nothing here knows of training. Start at `builtin`."""

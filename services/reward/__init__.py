"""The built-in rewards as a service, one file a reward. Nothing here depends on training. Start at `builtin`."""

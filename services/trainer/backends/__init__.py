"""Training backends, chosen by name."""

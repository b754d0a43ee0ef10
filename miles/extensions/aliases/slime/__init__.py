"""The names that functions written for slime import, from this system's modules."""

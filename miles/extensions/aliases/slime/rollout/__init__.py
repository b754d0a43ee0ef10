"""Names of this system's modules."""

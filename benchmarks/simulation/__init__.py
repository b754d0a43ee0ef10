"""A simulated cluster around a real controller."""

"""The services of a run. None imports another; what they share is in `miles`."""

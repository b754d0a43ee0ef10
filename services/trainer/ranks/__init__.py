"""Several ranks as one trainer: rank 0 leads, and every rank runs the same commands. Start at `leader`."""

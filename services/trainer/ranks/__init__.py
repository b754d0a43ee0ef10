"""Several ranks as one trainer: rank 0 leads, and every rank carries out the same commands. Start at `leader`."""

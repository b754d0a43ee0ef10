"""Which GPUs of which node each process gets. Pure: counts go in, GPU numbers come out. Start at `deal`."""

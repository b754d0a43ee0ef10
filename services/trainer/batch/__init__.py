"""The samples of a step as micro-batches: which rank trains on which, in which rows. Pure functions. Start at
`rollout_batch`."""

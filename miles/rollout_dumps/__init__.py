"""Files with the samples of one rollout, which a run writes and another one trains on. Start at `files`."""

"""How long the controller waits for what, in seconds. Each wait's error names it and its limit."""

WORKERS_ATTACH_S = 300.0
NODES_ATTACH_S = 86400.0
"""How long a trainer of several nodes may be away in the middle of a run: a link or a machine has to be mended."""
START_JOB_SILENCE_S = 600.0
"""Longest time between two messages of a worker that loads a model."""
PROGRESS_SILENCE_S = 60.0
"""A rollout reports about once a second; this much silence on a live stream means that it hangs."""
TRAIN_SILENCE_S = 900.0
"""Longest time between two progress messages of a trainer in a step."""
ABANDON_S = 10.0
"""How long a trainer may take to answer whether it can abandon a step; it answers at once, even while it trains."""
EXPORT_S = 600.0
ACTIVATE_S = 120.0
CHECKPOINT_S = 1800.0
STOP_JOB_S = 30.0
RELEASE_MEMORY_S = 120.0
HOLD_DRAFTS_S = 60.0
"""How long the draft trainer may take to end an optimizer step and to leave its GPU; then the run goes on beside it."""
WATCH_DRAFTS_SILENCE_S = 60.0
"""The draft trainer reports about once a second."""
LIST_VERSIONS_S = 5.0
CHECK_ENGINES_S = 50.0
"""How long engines may take to hash what they serve."""
DRAIN_S = 300.0
"""How long running groups may take to finish when the trainer was lost, before they are preempted."""
PREEMPT_S = 60.0
"""How long workers may take to store the unfinished responses of preempted groups."""
REDIS_S = 600.0
"""How long Redis may be away before the job fails."""
FENCE_S = 600.0
"""How long fencing a worker may take, with Redis away."""
GROUPS_IN_QUEUE_S = 120.0
"""How long the trainer waits for groups that the controller knows to be queued."""

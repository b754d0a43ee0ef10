"""How long the controller waits for what, in seconds. Each wait's error names it and its limit."""

WORKERS_ATTACH_S = 300.0
START_JOB_SILENCE_S = 600.0
"""Longest time without a word from a worker that loads a model."""
TRAIN_SILENCE_S = 900.0
"""Longest time without progress from a trainer in a step."""
ABANDON_S = 10.0
"""How long a trainer may take to say whether it can leave a step; it answers at once, whatever it does."""
EXPORT_S = 600.0
ACTIVATE_S = 120.0
CHECKPOINT_S = 1800.0
STOP_JOB_S = 30.0
RELEASE_MEMORY_S = 120.0
DRAIN_S = 300.0
"""How long running groups may take to finish when the trainer was lost, before they are given up."""
GIVE_UP_S = 60.0
"""How long workers may take to keep what there is of groups that are given up."""
REDIS_S = 600.0
"""How long Redis may be away before the job fails."""
GROUPS_IN_QUEUE_S = 120.0
"""How long the trainer waits for groups that the controller knows to be queued."""

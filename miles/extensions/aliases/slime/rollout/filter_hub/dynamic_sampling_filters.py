"""The built-in filters."""

from miles.rollout.filter_hub.dynamic_sampling_filters import check_no_aborted as check_no_aborted
from miles.rollout.filter_hub.dynamic_sampling_filters import check_reward_nonzero_std as check_reward_nonzero_std

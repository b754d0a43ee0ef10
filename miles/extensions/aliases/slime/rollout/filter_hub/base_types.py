"""What a filter returns."""

from miles.rollout.filter_hub.base_types import DynamicFilterOutput as DynamicFilterOutput

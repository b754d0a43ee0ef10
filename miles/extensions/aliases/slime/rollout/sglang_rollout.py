"""What generate functions need."""

from miles.rollout.sglang_rollout import GenerateState as GenerateState
from miles.rollout.sglang_rollout import generate as generate
from miles.rollout.sglang_rollout import get_model_url as get_model_url

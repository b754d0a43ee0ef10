"""The SDK for writing a reward in a few lines and serving it, and the client of reward services.

from miles.reward_sdk import reward, serve

@reward
def is_short(sample):
    return 1.0 if len(sample.response) < 100 else 0.0

serve(port=9000)
"""

from miles.reward_sdk.client import RewardClient, ScoreOutcome
from miles.reward_sdk.functions import RewardFunction, RewardLoadError, Source, reward
from miles.reward_sdk.pool import WorkerPool
from miles.reward_sdk.scored import Scored
from miles.reward_sdk.server import serve, start_reward_server
from miles.reward_sdk.servicer import RewardServicer

__all__ = [
    "RewardClient",
    "RewardFunction",
    "RewardLoadError",
    "RewardServicer",
    "ScoreOutcome",
    "Scored",
    "Source",
    "WorkerPool",
    "reward",
    "serve",
    "start_reward_server",
]

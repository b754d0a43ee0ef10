"""Reinforcement-learning post-training of large language models as independent services."""

import os

__version__ = "0.1.0"

# gRPC reads this when it is imported. Its handlers of forks end some children before they become another program, and
# PyTorch then has no process that shares memory: "no response from torch_shm_manager". No fork here goes on with gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

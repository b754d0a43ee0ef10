"""Reinforcement-learning post-training of large language models as independent services."""

__version__ = "0.1.0"

"""The names by which a sample chooses what scores it."""

from __future__ import annotations

DEFAULT_SERVICE = "default"
"""The reward service that scores samples which name none."""
SERVICE_KEY = "reward_service"
"""Metadata that names a sample's reward service."""
REWARD_KEY = "rm_type"
"""Metadata that names a sample's reward within its service."""

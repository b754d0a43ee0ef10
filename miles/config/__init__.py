"""The configuration of a job: typed models, spelled the same on the command line, in YAML and over REST."""

from miles.config.faults import ConfigError, Fault
from miles.config.job import JobConfig

__all__ = ["ConfigError", "Fault", "JobConfig"]

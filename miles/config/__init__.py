"""The configuration of a job: typed models, spelled the same on the command line, in YAML and over REST."""

from miles.config.job import JobConfig
from miles.config.schema.faults import ConfigError, Fault

__all__ = ["ConfigError", "Fault", "JobConfig"]

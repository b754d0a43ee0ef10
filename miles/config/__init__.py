"""The configuration of a job: typed models with the same names on the command line, in YAML and over REST.

It starts nothing. Start at `job` (`JobConfig`); `sections` has the settings themselves.
"""

from miles.config.job import JobConfig
from miles.config.schema.faults import ConfigError, Fault

__all__ = ["ConfigError", "Fault", "JobConfig"]

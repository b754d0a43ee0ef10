"""Notes: what a dry run says about settings that are accepted and change nothing, or less than they seem to.

A note is no fault. `registry` runs them, the other files have them by subject.
"""

from miles.config.notes import architecture as architecture
from miles.config.notes import checkpoints as checkpoints
from miles.config.notes import debug as debug
from miles.config.notes import distillation as distillation
from miles.config.notes import drafts as drafts
from miles.config.notes import effects as effects
from miles.config.notes import evaluation as evaluation
from miles.config.notes import extensions as extensions
from miles.config.notes import megatron as megatron
from miles.config.notes import precision as precision
from miles.config.notes import staleness as staleness
from miles.config.notes import statements as statements
from miles.config.notes import trackers as trackers
from miles.config.notes import trainer as trainer
from miles.config.notes.registry import Note as Note
from miles.config.notes.registry import notes as notes

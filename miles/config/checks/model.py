"""The checks of what config.json says of a model: whether trainer and engines of some settings can have it."""

from __future__ import annotations

from miles.config.checks.architecture.compare import architecture_faults
from miles.config.checks.engine_model import engine_faults
from miles.config.checks.expert_kernels import dispatcher_faults
from miles.config.checks.export_format import export_faults
from miles.config.checks.model_family import family_faults
from miles.config.checks.model_layout import layout_faults
from miles.config.checks.precision import precision_faults
from miles.config.checks.published_form import form_faults
from miles.config.checks.served_precision import served_precision_faults
from miles.config.rules.registry import Rule, run_rules
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

MODEL_CHECKS: tuple[Rule, ...] = (
    form_faults,
    family_faults,
    layout_faults,
    architecture_faults,
    dispatcher_faults,
    engine_faults,
    precision_faults,
    served_precision_faults,
    export_faults,
)


def model_faults(settings: FlatSettings) -> list[Fault]:
    """Return the faults that a model has with settings, whatever else is there."""
    return run_rules(MODEL_CHECKS, settings)

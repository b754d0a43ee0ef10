"""The parts of a configuration: base class of sections, catalog of all fields, derived settings, faults.

No setting is defined here; `sections` has those. Start at `section`.
"""

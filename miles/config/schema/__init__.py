"""What a configuration is made of: the base of sections, the table of all fields, derived settings and faults.

No setting is defined here; `sections` has those. Start at `section`.
"""

"""The configuration as text: the command line, YAML files, and the reference page.

No setting is checked against another here. Start at `flags`.
"""

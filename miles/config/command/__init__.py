"""The configuration as text: command line, YAML files, and reference page.

Settings are not checked against each other here. Start at `flags`.
"""

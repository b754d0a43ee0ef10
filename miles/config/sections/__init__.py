"""The settings themselves, one section a file.

A section never reads another; what crosses sections is a rule in `rules`.
"""

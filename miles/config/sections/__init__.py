"""The settings themselves, one section per file.

A section never reads another; relations between sections are in `rules`.
"""

"""How much memory and disk a run takes, from a model's config.json and settings alone.

Pure arithmetic: nothing is loaded, and PyTorch is not needed. Every figure has its formula in words. `model` reads the
shape, `parameters` counts, `run` holds what settings say; a file each for what takes memory; `report` adds up by
process and GPU. The doctor, `miles plan` and the dry run all show these figures.
"""

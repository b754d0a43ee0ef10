"""Modules that SGLang servers import: on their PYTHONPATH, without the package, which their environment may lack."""

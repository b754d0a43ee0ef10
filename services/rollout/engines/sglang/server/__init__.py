"""SGLang servers as processes: their command line, their HTTP interface, whether they answer, when they are restarted.

Start at `replica`.
"""

"""SGLang servers: their command line, process, HTTP interface, probes and restarts.

Nothing here knows what a request or a version means. Start at `replica`.
"""

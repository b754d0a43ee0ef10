"""One client for each service that the controller calls, with its errors and deadlines.

Nothing is decided here. Start at `calls`.
"""

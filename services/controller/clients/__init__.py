"""One client for each service that the controller calls, with its errors and deadlines.

No client decides anything or answers a user. Start at `calls`.
"""

"""The workers that are attached: their leases, their load, and which of them a job needs.

Nothing here knows a step. Start at `registry`.
"""

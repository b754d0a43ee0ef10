"""The attached workers: their worker leases, their load, and which of them a job needs.

Nothing here knows about steps or groups of a run. Start at `registry`.
"""

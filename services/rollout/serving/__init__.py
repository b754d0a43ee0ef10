"""Whether an engine may serve, and which version: its weights, pauses and quarantine.

Nothing here talks to a particular engine. Start at `readiness`.
"""

"""Drafts of the torch engine: where they come from, and when they pay. What they propose never changes a response."""

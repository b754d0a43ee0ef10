"""The draft trainer: a service of its own that trains draft models beside the policy and publishes their versions.

It reads what the trainer has recorded (`miles.drafts.recording`) and never touches the policy, its queue or its steps.
"""

"""The REST API and web page: keys, limits, jobs, and reading what runs left.

It has no logic of training and never touches Redis. Start at `app`.
"""

"""What the drafts of a run's engines are good for: counted, watched, told. Pure: nothing here talks to a service.

Start at `acceptance`.
"""

"""What can be checked on this machine before anything starts: files, functions, ports, devices.

Nothing here knows a flag's spelling. Start at `environment`.
"""

"""`miles doctor`: checks a machine, and a configuration on it, before anything is started.

Each check is a file of two parts: `look` gathers facts from the machine, and `judge` turns facts into findings. Checks
start no service, write nothing and are bounded in time. Start at `command`; `checks` lists them.
"""

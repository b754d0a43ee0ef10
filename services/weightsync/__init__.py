"""The weightsync service: keeps versions of the weights and brings every engine to the active one.

It never converts weights. Start at `service` (the calls), then `stream` (one stream of one job) and `publication` (its
state machine).
"""

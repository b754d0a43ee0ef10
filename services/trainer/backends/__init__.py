"""Training backends, chosen by name: how the models are held, trained and saved. They never see gRPC or the queue.

Start at `protocol`, then `base`.
"""

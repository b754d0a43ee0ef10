"""Teachers of on-policy distillation behind SGLang servers, which are asked while other responses are generated.

Start at `served`. Nothing here trains: what a teacher says travels with the sample to the trainer.
"""
